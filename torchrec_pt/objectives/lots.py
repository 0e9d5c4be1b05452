"""What a lot, a number drawn uniformly from [0, 1), decides about a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged


def draw_place(lot: Tensor, last: Tensor) -> Tensor:
    """(R,) int64 from 0 to `last` (R,), each as likely, by lots (R,)."""
    return (lot * (last + 1)).long().minimum(last)


def draw_name(lot: Tensor, names: Sequence[str]) -> Callable[[str], Tensor]:
    """Deals one of the names to each row by lots (R,): asked for a name, (R,) bool of who got it.

    Nobody gets a name that is not among them.
    """
    dealt = (lot * len(names)).long().clamp(max=len(names) - 1)

    def got(name: str) -> Tensor:
        return dealt == names.index(name) if name in names else dealt < 0

    return got


def has_lowest(lots: Jagged) -> Tensor:
    """(T,) bool: the entries whose lot (T,) is the lowest of their row."""
    lowest = torch.full((lots.num_rows,), torch.inf)
    lowest = lowest.scatter_reduce(0, lots.rows, lots.values, "amin")
    return lots.values == lowest[lots.rows]
