"""Rows of unequal length in one flat tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Jagged:
    """Row i is values[offsets[i]:offsets[i + 1]].

    Args:
        values: (T, …) of any dtype.
        offsets: (R + 1,) int64 on the same device, ascending from 0 to T.
        times: (T,) float64, when each value happened, NaN where that is not known; or None.
            Whatever takes values takes their times along.
    Raises:
        ValueError: wrong shapes or an offsets dtype other than int64. That offsets ascend to T is
            not checked: it would wait for the device.
    """

    values: Tensor
    offsets: Tensor
    times: Tensor | None = None

    def __post_init__(self) -> None:
        if self.offsets.dim() != 1 or not len(self.offsets) or self.offsets.dtype != torch.int64:
            raise ValueError(
                f"Jagged.offsets: must be (R + 1,) int64, "
                f"given {tuple(self.offsets.shape)} {self.offsets.dtype}"
            )
        if self.times is not None and self.times.shape != self.values.shape[:1]:
            raise ValueError(
                f"Jagged.times: must be one a value, ({len(self.values)},), "
                f"given {tuple(self.times.shape)}"
            )

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor, times: Tensor | None = None) -> Jagged:
        """Cut `values` (T, …) into rows of `lengths` (R,), which sum to T."""
        return cls(values, _offsets(lengths), times)

    @classmethod
    def stack(cls, parts: Sequence[Jagged]) -> Jagged:
        """All rows of the first part, then those of the second, …"""
        values = torch.cat([part.values for part in parts])
        times = None
        if any(part.times is not None for part in parts):
            times = torch.cat([part.times_or_nan for part in parts])
        return cls.from_lengths(values, torch.cat([part.lengths for part in parts]), times)

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

    @property
    def times_or_nan(self) -> Tensor:
        """(T,) float64: `times`, all of them unknown where it is None."""
        if self.times is not None:
            return self.times
        unknown = (len(self.values),)
        return torch.full(unknown, torch.nan, dtype=torch.float64, device=self.offsets.device)

    def to(self, device: torch.device) -> Jagged:
        times = None if self.times is None else self.times.to(device)
        return Jagged(self.values.to(device), self.offsets.to(device), times)

    def with_values(self, values: Tensor) -> Jagged:
        """The same rows, and the times of their places, around other values (T, …)."""
        return replace(self, values=values)

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
        return self._taken(keep, kept_before[self.offsets])

    def argsort(self) -> Tensor:
        """(T,) int64 places of the values (T,), ascending in each row; equal ones as they stand."""
        order = self.values.argsort(stable=True)
        return order[self.rows[order].argsort(stable=True)]

    def to_sets(self) -> Jagged:
        """The values of each row once, ascending; without times."""
        ascending = Jagged(self.values[self.argsort()], self.offsets)
        is_first = torch.ones_like(ascending.values, dtype=torch.bool)
        is_first[1:] = (ascending.values.diff() != 0) | (ascending.rows.diff() != 0)
        return ascending.filter(is_first)

    def slices(self, starts: Tensor, lengths: Tensor) -> Jagged:
        """Rows values[starts[i]:starts[i] + lengths[i]]; starts (S,) count from the first value."""
        offsets = _offsets(lengths)
        total = int(offsets[-1])
        shift = (starts - offsets[:-1]).repeat_interleave(lengths, output_size=total)
        return self._taken(torch.arange(total, device=shift.device) + shift, offsets)

    def _taken(self, index: Tensor, offsets: Tensor) -> Jagged:
        times = None if self.times is None else self.times[index]
        return Jagged(self.values[index], offsets, times)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0)])
