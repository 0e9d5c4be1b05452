"""An item's row of the table and its features as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrec_pt.data.entity_features import EntityFeatures
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.rng import RowNoise


class ItemContent(nn.Module):
    """row + Σ of the features' vectors, so that an item without a trained row has a vector too.

    In training a row is hidden with probability `row_dropout`, once a step for all places of the
    item, so that the features alone make a usable vector (Volkovs et al. 2017, DropoutNet,
    section 4). Of an item that training never saw, the row is always hidden.

    Args:
        num_trained: items with a training interaction; dense ids count these first.
    """

    def __init__(
        self, features: EntityFeatures, dim: int, *, row_dropout: float, num_trained: int
    ) -> None:
        super().__init__()
        self.row_dropout = row_dropout
        self.num_trained = num_trained
        self.features = FeatureEncoder(features, dim)

    def forward(self, ids: Tensor, rows: Tensor, noise: RowNoise | None = None) -> Tensor:
        """(N, D) of items (N,) int64 with rows (N, D); `noise` has a row an item, None hides none.

        Each item should stand among `ids` once, else its features are encoded as often.
        """
        is_hidden = ids >= self.num_trained
        if noise is not None and self.row_dropout:
            lot = noise.per_row("row_dropout", 1).squeeze(1)
            is_hidden = is_hidden | (lot < self.row_dropout)
        return torch.where(is_hidden.unsqueeze(1), 0.0, rows) + self.features(ids).sum(1)
