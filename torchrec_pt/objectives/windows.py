"""Windows of a history that is longer than the model reads."""

from __future__ import annotations

import torch

from torchrec_pt.data.batch import Rows
from torchrec_pt.data.jagged import Jagged


def draw_windows(rows: Rows, max_length: int, site: str) -> Jagged:
    """A stretch of at most `max_length` items of each history, where it starts drawn by the step.

    Over the epochs all of a long history is trained on, not its end alone. The items keep their
    times.
    """
    lengths = rows.histories.lengths
    spare = (lengths - max_length).clamp(min=0)
    lot = rows.noise.per_row(site, 1).squeeze(1)
    start = (lot * (spare + 1)).long().clamp(max=spare)
    return rows.histories.windows(start, torch.minimum(lengths, torch.tensor(max_length)))
