"""Vectors in narrower numbers, and what that costs.

int8 is symmetric by row: scale = max |x| / 127, code = round(x / scale), x ≈ code · scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_pt.config.export import Dtype

LARGEST_CODE = 127
NUM_NEIGHBOURS = 10
SAMPLE_ROWS = 4096
BLOCK_ROWS = 512  # of the sample, whose scores with all of it are held at a time


class Rounded(NamedTuple):
    """(N, dim) in the dtype asked for; of int8 alone (N,) float32 scales."""

    values: Tensor
    scales: Tensor | None

    def restored(self) -> Tensor:
        """(N, dim) float32."""
        values = self.values.float()
        return values if self.scales is None else values * self.scales.unsqueeze(1)


def round_to(vectors: Tensor, dtype: Dtype) -> Rounded:
    """
    Args:
        vectors: (N, dim) float32.
    Raises:
        ValueError: numbers that float16 does not reach.
    """
    if dtype != "int8":
        values = vectors.to(getattr(torch, dtype))
        if dtype == "float16" and values.isinf().any():
            raise ValueError(
                f"dtype: float16 reaches 65504, the vectors {vectors.abs().max():g}; "
                "use bfloat16, int8 or float32"
            )
        return Rounded(values, None)
    scales = vectors.abs().amax(1) / LARGEST_CODE
    divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    codes = (vectors / divisors).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    return Rounded(codes.to(torch.int8), scales)


@dataclass(frozen=True)
class Rounding:
    """What was lost.

    Attributes:
        max_relative_error, rms_relative_error: of ‖x − x̂‖ / ‖x‖ over the rows.
        neighbours_kept: share of each row's 10 best others by inner product, exact, that are
            among the 10 best of the rounded rows: within a sample spread over the rows.
        num_sampled: rows of the sample.
    """

    max_relative_error: float
    rms_relative_error: float
    neighbours_kept: float
    num_sampled: int

    def __str__(self) -> str:
        return (
            f"relative error of rounding at most {self.max_relative_error:.2g}, root mean square "
            f"{self.rms_relative_error:.2g}; {self.neighbours_kept:.2%} of the {NUM_NEIGHBOURS} "
            f"nearest kept among {self.num_sampled:,} rows"
        )


class RoundingMeter:
    """Fed with the blocks of `num_rows` rows, in order."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        num_sampled = min(num_rows, SAMPLE_ROWS)
        self._sampled = torch.arange(num_sampled) * num_rows // max(1, num_sampled)
        self._begin = 0
        self._max = 0.0
        self._sum_of_squares = 0.0
        self._exact: list[Tensor] = []
        self._rounded: list[Tensor] = []

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        """(N, dim) float32 each."""
        error = (exact - rounded).norm(dim=1).double()
        relative = torch.where(error > 0, error / exact.norm(dim=1), 0.0)
        self._max = max(self._max, float(relative.max())) if len(relative) else self._max
        self._sum_of_squares += float(relative.square().sum())
        end = self._begin + len(exact)
        here = self._sampled[(self._sampled >= self._begin) & (self._sampled < end)] - self._begin
        self._exact.append(exact[here])
        self._rounded.append(rounded[here])
        self._begin = end

    def found(self) -> Rounding:
        return Rounding(
            max_relative_error=self._max,
            rms_relative_error=(self._sum_of_squares / max(1, self._num_rows)) ** 0.5,
            neighbours_kept=_share_kept(torch.cat(self._exact), torch.cat(self._rounded)),
            num_sampled=len(self._sampled),
        )


def _share_kept(exact: Tensor, rounded: Tensor) -> float:
    """Of the nearest other rows of each of S rows (S, dim); 1 where there are none."""
    k = min(NUM_NEIGHBOURS, len(exact) - 1)
    if k < 1:
        return 1.0
    num_kept = 0
    for begin in range(0, len(exact), BLOCK_ROWS):
        here = torch.arange(begin, min(begin + BLOCK_ROWS, len(exact)))
        is_near = []
        for rows in (exact, rounded):
            scores = rows[here] @ rows.T
            scores[here - begin, here] = -torch.inf
            near = scores.topk(k).indices
            is_near.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, near, True))
        num_kept += int((is_near[0] & is_near[1]).sum())
    return num_kept / (k * len(exact))
