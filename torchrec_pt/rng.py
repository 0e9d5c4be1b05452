"""Randomness that depends on (seed, step, global row) alone.

Masks, crops, shuffles and dropout of a row come out the same whichever rank
holds the row and whoever shares its batch, so one process and many train
alike, and a resumed run needs no generator state. The bits are a splitmix64
hash (Steele, Lea, Flood 2014) of a counter, in plain int64 tensor arithmetic.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer; int64 in, int64 out, elementwise."""
    x = x + _GOLDEN
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


def key(*parts: int | str) -> int:
    """A signed 64-bit key for a place that needs randomness, such as (seed, step, "crop")."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def unit_interval(bits: Tensor) -> Tensor:
    """Hash bits to float32 in [0, 1), 24 bits each."""
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def permutation(num: int, *parts: int | str) -> Tensor:
    """(num,) int64, a random order of 0 … num − 1 for the key `parts`."""
    return torch.argsort(mix(torch.arange(num) + key(*parts)), stable=True)


def normal_rows(rows: Tensor, dim: int, *parts: int | str) -> Tensor:
    """(len(rows), dim) float32 standard normals; row r is the same whoever asks for it."""
    base = mix(rows + key(*parts)).unsqueeze(1)
    bits = mix(base + torch.arange(dim, device=rows.device) * _GOLDEN)
    # Centred, so that erfinv never sees ±1.
    centred = (_shift_right(bits, 40).to(torch.float64) + 0.5) * 2.0**-24 * 2 - 1
    return (torch.erfinv(centred) * 2**0.5).float()


@dataclass(frozen=True)
class RowNoise:
    """The randomness of one step's rows.

    Attributes:
        seed: of the run.  step: counted from 0.
        rows: (B,) int64, number of each row in the global batch.
    """

    seed: int
    step: int
    rows: Tensor

    def copies(self, num: int) -> RowNoise:
        """The noise of `num` copies of the rows, (num · B,): all rows, then all again, …"""
        each = [self.rows * num + copy for copy in range(num)]
        return RowNoise(self.seed, self.step, torch.cat(each))

    def per_row(self, site: str, num: int) -> Tensor:
        """(B, num) float32 uniform in [0, 1)."""
        return unit_interval(self._row_bits(site, num))

    def _row_bits(self, site: str, num: int) -> Tensor:
        """(B, num) int64."""
        base = mix(self.rows + key(self.seed, self.step, site)).unsqueeze(1)
        return mix(base + torch.arange(num, device=self.rows.device) * _GOLDEN)

    def per_token(self, site: str, row_of_token: Tensor, position: Tensor) -> Tensor:
        """(T,) float32 uniform in [0, 1); the token at `position` of row `row_of_token`."""
        return unit_interval(self.token_bits(site, row_of_token, position))

    def token_bits(self, site: str, row_of_token: Tensor, position: Tensor) -> Tensor:
        """(T,) int64 hash bits, the base from which `ops.dropout` goes on."""
        base = mix(self.rows + key(self.seed, self.step, site))
        return mix(base[row_of_token] + position * _GOLDEN)
