"""Items of which few are popular, and draws of them that do not come from what is measured."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.data.jagged import Jagged


def zipf_counts(num_items: int, seed: int = 0) -> Tensor:
    """(num_items,) float64: in random order, that of the item of rank r is about 10 num_items / r.

    Every item was seen once at least.
    """
    ranks = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed)) + 1
    return (10 * num_items / ranks.double()).floor().clamp(min=1)


def draw(weights: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """(num_draws,) int64, by the inverse of the running sum of the weights."""
    running = weights.cumsum(0)
    at = torch.rand(num_draws, dtype=torch.float64, generator=generator) * running[-1]
    return torch.searchsorted(running, at, right=True).clamp(max=weights.shape[0] - 1)


def draw_sets(weights: Tensor, num_rows: int, size: int, seed: int) -> Jagged:
    """`size` items in each row, ascending; one that is drawn twice is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    items = draw(weights, num_rows * size, generator).view(num_rows, size)
    while True:
        items = items.sort(dim=1).values
        again = F.pad(items.diff(dim=1) == 0, (1, 0))
        if not again.any():
            return Jagged(items.flatten(), torch.arange(num_rows + 1) * size)
        items[again] = draw(weights, int(again.sum()), generator)
