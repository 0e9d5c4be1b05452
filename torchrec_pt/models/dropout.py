"""Dropout whose randomness belongs to the row, not to the batch or the rank."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from torchrec_pt.ops import dropout
from torchrec_pt.rng import RowNoise


class RowDropout:
    """Dropout of (T, D) activations, D a multiple of 4; each call is a new site.

    Args:
        noise: None drops nothing.
        row: (T,) int64, the row of `noise` that each activation belongs to.
        slot: (T,) int64, tells apart the activations of one row.
    """

    def __init__(
        self, p: float, noise: RowNoise | None, name: str, row: Tensor, slot: Tensor
    ) -> None:
        self.p = p
        self.site = 0
        self.bits = noise.token_bits(name, row, slot) if noise is not None and p > 0 else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return x
        self.site += 1
        return dropout(x, self.p, self.bits, self.site)

    def of(self, pick: Callable[[Tensor], Tensor]) -> RowDropout:
        """That of the activations that `pick` takes of (T,), from the present site on."""
        picked = copy.copy(self)
        picked.bits = None if self.bits is None else pick(self.bits)
        return picked


class ItemDropout(RowDropout):
    """The same where activations of one item share their mask, whichever rows they stand in.

    Args:
        items: (T,) int64.
    """

    def __init__(self, p: float, noise: RowNoise | None, name: str, items: Tensor) -> None:
        if noise is not None:
            noise = RowNoise(noise.seed, noise.step, items)
        super().__init__(p, noise, name, torch.arange(len(items), device=items.device), 0 * items)
