"""Which labels a task may read, where it is to make do with a share of them."""

from __future__ import annotations

from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.rng import RowNoise


def labelled(dataset: PreparedDataset, fraction: float, seed: int) -> Tensor:
    """(N,) bool: the interactions whose labels may be read, a share of all but those of test.

    Which they are depends on the seed and the interaction alone.
    """
    rows = dataset.interactions
    noise = RowNoise(seed, 0, dataset.user_ids)
    return noise.per_token("labels", rows.rows, rows.positions) < fraction
