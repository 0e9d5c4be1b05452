"""Windows of a history that is longer than the model reads, and stretches inside of one."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_pt.data.batch import Rows
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.objectives.lots import draw_place


def draw_windows(rows: Rows, max_length: int, site: str) -> Jagged:
    """A stretch of at most `max_length` items of each history, where it starts drawn by the step.

    Over the epochs all of a long history is trained on, not its end alone. The items keep their
    times.
    """
    lengths = rows.histories.lengths
    spare = (lengths - max_length).clamp(min=0)
    lot = rows.noise.per_row(site, 1).squeeze(1)
    return rows.histories.windows(
        draw_place(lot, spare), torch.minimum(lengths, torch.tensor(max_length))
    )


def permute_stretches(history: Jagged, begin: Tensor, length: Tensor, lot: Tensor) -> Jagged:
    """Of each row the entries [begin, begin + length) in the order of their lots.

    Times stay with their places: the items in this order, at the times of the history.

    Args:
        begin, length: (R,) int64; a length of 0 leaves its row alone.
        lot: (T,) float32 in [0, 1).
    """
    row, position = history.rows, history.positions
    is_moved = (position >= begin[row]) & (position < (begin + length)[row])
    place = torch.where(is_moved, begin[row] + lot.double() * length[row], position.double())
    order = torch.argsort(history.offsets[row] + place, stable=True)
    return history.with_values(history.values[order])
