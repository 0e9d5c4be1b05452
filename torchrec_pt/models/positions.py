"""How attention learns of the places and times of a history's items, other than by a vector each.

Rotary: queries and keys turned by their position.
RelativeTimeBias: a bias of the logits, by the distance of two items and by the time between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrec_pt.data.jagged import Jagged

ROTARY_BASE = 10_000.0
NUM_TIME_BUCKETS = 128
TIME_BUCKET_WIDTH = 0.301  # of the natural logarithm: each holds times 1.35 times as long


class Rotary(nn.Module):
    """RoPE (Su et al. 2021, section 3.2): query · key then knows their distance alone.

    The dimensions i and i + d/2 of a head's d form a pair, which position p turns by the angle
    p · 10000^(−2i / d). The paper pairs 2i and 2i + 1: another order of the projections' outputs.

    Args:
        max_length: positions; the last is 0 and those before it −1, −2, …, steps into the past.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_length: int) -> None:
        super().__init__()
        position = torch.arange(1.0 - max_length, 1.0)
        angle = torch.outer(position, ROTARY_BASE ** (-torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, heads: Tensor, slot: Tensor) -> Tensor:
        """(T, H, d) at the positions numbered `slot` (T,) int64, from 0, turned."""
        cos, sin = self.cos[slot].unsqueeze(1), self.sin[slot].unsqueeze(1)
        first, second = heads.chunk(2, dim=2)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=2)


class RelativeTimeBias(nn.Module):
    """b[h, i − j] + c[h, bucket(t_i − t_j)] for query i and key j in head h.

    HSTU (Zhai et al. 2024, section 3.1, and its code): bucket(t) = ⌊ln max(1, |t|) / 0.301⌋, at
    most 127, the 129th for a time that is not known. As in T5 (Raffel et al. 2020, section 2.1)
    heads differ and layers share. A shift of all times changes nothing, nor does it that all are
    unknown, since a softmax does not see a constant.
    """

    def __init__(self, num_heads: int, max_length: int, is_causal: bool) -> None:
        super().__init__()
        self.farthest_ahead = 0 if is_causal else max_length - 1
        num_distances = self.farthest_ahead + max_length
        self.distance = nn.Parameter(torch.empty(num_heads, num_distances))
        self.elapsed = nn.Parameter(torch.empty(num_heads, NUM_TIME_BUCKETS + 1))

    def forward(self, tokens: Jagged, times: Tensor, longest: int) -> Tensor:
        """(R, H, L, L) for R rows of tokens at `times` (T,) float64, padded to L = `longest`.

        So much memory, and as much for its gradient, holds the bias; all layers share it.
        """
        place = torch.arange(longest, device=times.device)
        # Of keys after a causal query, which attention hides, it does not matter what is said.
        distance = (place.unsqueeze(1) - place).clamp(min=-self.farthest_ahead)
        padded = times.new_full((tokens.num_rows, longest), torch.nan)
        padded[tokens.rows, tokens.positions] = times
        # Differences in float64: a second of today's Unix time is lost in float32.
        between = (padded.unsqueeze(2) - padded.unsqueeze(1)).float()
        by_distance = _looked_up(self.distance, distance + self.farthest_ahead)
        by_time = _looked_up(self.elapsed, time_bucket(between))
        return by_distance + by_time.transpose(0, 1)


def time_bucket(between: Tensor) -> Tensor:
    """int64 of the bucket of each time between (…) float32, NaN where one is not known."""
    bucket = between.abs().clamp_(min=1).log_().div_(TIME_BUCKET_WIDTH)
    return bucket.clamp_(max=NUM_TIME_BUCKETS - 1).nan_to_num_(nan=NUM_TIME_BUCKETS).long()


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """(H, …) of a table (H, B) at index (…).

    The gradient of `gather` adds up in one order on CPU, that of indexing does not; and that of
    `embedding` takes 10 times as long.
    """
    flat = index.flatten().expand(len(table), -1)
    return table.gather(1, flat).unflatten(1, index.shape)
