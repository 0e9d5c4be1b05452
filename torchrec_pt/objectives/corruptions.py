"""Corruptions of a history (BART, Lewis et al. 2020, section 2.2, and BERT's random items).

delete: each item goes with probability `delete_fraction`; one stays.
infill: spans become one [MASK] each. Each item begins a span with probability
    `infill_fraction` / 3.05, the mean length, and one item of the row in any case; a span has
    max(1, Poisson(3)) items, or ends with the row; spans that touch become one [MASK].
shuffle: a stretch of `shuffle_fraction` of the items is permuted.
replace: each item becomes one drawn uniformly with probability `replace_fraction`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchrec_pt.config import Denoising
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.objectives.lots import draw_name, draw_place, has_lowest
from torchrec_pt.objectives.windows import permute_stretches
from torchrec_pt.rng import RowNoise

_POISSON = [math.exp(-3) * 3**num / math.factorial(num) for num in range(20)]
_AT_MOST = torch.tensor(_POISSON).cumsum(0)  # probability of a span of at most so many items
_MEAN_SPAN = 3 + _POISSON[0]  # since one of none gets one


def corrupt(
    history: Jagged, config: Denoising, noise: RowNoise, num_items: int
) -> tuple[Jagged, Tensor]:
    """Each row by one of the configured corruptions; a row that has an item keeps one.

    Args:
        history: jagged item ids.
        num_items: what replaces an item is one of 0 … num_items − 1.
    Returns:
        jagged ids, and (T,) bool, which of them are [MASK].
    """
    row, position, lengths = history.rows, history.positions, history.lengths
    lot_of_name, lot_of_row = noise.per_row("corruption.row", 2).unbind(1)
    chosen = draw_name(lot_of_name, config.corruptions)
    lot = noise.per_token("corruption.item", row, position)  # for the one corruption of its row
    is_lowest = has_lowest(history.with_values(lot))

    is_replaced = chosen("replace")[row] & (lot < config.replace_fraction)
    other = noise.token_bits("corruption.other", row, position) % num_items
    history = history.with_values(torch.where(is_replaced, other, history.values))

    length = (lengths * config.shuffle_fraction).long()
    begin = draw_place(lot_of_row, lengths - length)
    history = permute_stretches(history, begin, torch.where(chosen("shuffle"), length, 0), lot)

    is_begin = is_lowest | (lot < config.infill_fraction / _MEAN_SPAN)
    size = torch.searchsorted(_AT_MOST, noise.per_token("corruption.span", row, position))
    is_hidden = _covered(history, is_begin & chosen("infill")[row], size.clamp(min=1))
    follows = torch.zeros_like(is_hidden)
    follows[1:] = is_hidden[1:] & is_hidden[:-1] & (row[1:] == row[:-1])

    is_deleted = chosen("delete")[row] & (lot >= 1 - config.delete_fraction) & ~is_lowest
    is_kept = ~follows & ~is_deleted
    return history.filter(is_kept), is_hidden[is_kept]


def _covered(history: Jagged, is_begin: Tensor, size: Tensor) -> Tensor:
    """(T,) bool: in a span of `size` (T,) entries from an entry where `is_begin`, in its row."""
    place = torch.arange(len(size))
    end = torch.where(is_begin, (place + size).minimum(history.offsets[history.rows + 1]), 0)
    return place < end.cummax(0).values
