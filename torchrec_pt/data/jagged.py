"""Rows of unequal length in one flat tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Jagged:
    """Row i is values[offsets[i]:offsets[i + 1]].

    Args:
        values: (T, …) of any dtype.
        offsets: (R + 1,) int64 on the same device, ascending from 0 to T.
    Raises:
        ValueError: wrong shapes or an offsets dtype other than int64. That offsets ascend to T is
            not checked: it would wait for the device.
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        if self.offsets.dim() != 1 or not len(self.offsets) or self.offsets.dtype != torch.int64:
            raise ValueError(
                f"Jagged.offsets: must be (R + 1,) int64, "
                f"given {tuple(self.offsets.shape)} {self.offsets.dtype}"
            )

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> Jagged:
        """Cut `values` (T, …) into rows of `lengths` (R,), which sum to T."""
        return cls(values, _offsets(lengths))

    @classmethod
    def stack(cls, parts: Sequence[Jagged]) -> Jagged:
        """All rows of the first part, then those of the second, …"""
        values = torch.cat([part.values for part in parts])
        return cls.from_lengths(values, torch.cat([part.lengths for part in parts]))

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """(R,) int64."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """(T,) int64: the row that each value belongs to."""
        rows = torch.arange(self.num_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.lengths, output_size=len(self.values))

    @property
    def positions(self) -> Tensor:
        """(T,) int64: the place of each value in its row, from 0."""
        return torch.arange(len(self.values), device=self.offsets.device) - self.offsets[self.rows]

    def to(self, device: torch.device) -> Jagged:
        return Jagged(self.values.to(device), self.offsets.to(device))

    def with_values(self, values: Tensor) -> Jagged:
        """The same rows around other values (T, …)."""
        return Jagged(values, self.offsets)

    def select(self, rows: Tensor) -> Jagged:
        """The rows named by `rows` (S,) int64, in that order; a row may be named twice."""
        starts = self.offsets[rows]  # not `lengths`, which would visit every row
        return self.slices(starts, self.offsets[rows + 1] - starts)

    def tail(self, max_length: int) -> Jagged:
        """The last `max_length` entries of each row, or all where a row is shorter."""
        if max_length < 0:
            raise ValueError(f"Jagged.tail: max_length must be 0 or more, given {max_length}")
        lengths = self.lengths.clamp(max=max_length)
        return self.slices(self.offsets[1:] - lengths, lengths)

    def windows(self, starts: Tensor, lengths: Tensor) -> Jagged:
        """Of each row the stretch of `lengths` (R,) entries from place `starts` (R,)."""
        return self.slices(self.offsets[:-1] + starts, lengths)

    def filter(self, keep: Tensor) -> Jagged:
        """The entries where `keep` (T,) bool is true; a row may become empty, none goes away."""
        kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        return Jagged(self.values[keep], kept_before[self.offsets])

    def to_sets(self) -> Jagged:
        """The values of each row once, ascending."""
        order = self.values.argsort(stable=True)
        order = order[self.rows[order].argsort(stable=True)]
        ascending = self.with_values(self.values[order])
        is_first = torch.ones_like(ascending.values, dtype=torch.bool)
        is_first[1:] = (ascending.values.diff() != 0) | (ascending.rows.diff() != 0)
        return ascending.filter(is_first)

    def slices(self, starts: Tensor, lengths: Tensor) -> Jagged:
        """Rows values[starts[i]:starts[i] + lengths[i]]; starts (S,) count from the first value."""
        offsets = _offsets(lengths)
        total = int(offsets[-1])
        shift = (starts - offsets[:-1]).repeat_interleave(lengths, output_size=total)
        return Jagged(self.values[torch.arange(total, device=shift.device) + shift], offsets)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0)])
