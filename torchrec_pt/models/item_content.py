"""An item's row of the table and its features as one vector."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchrec_pt.data.entity_features import EntityFeatures
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.rng import RowNoise


@dataclass(frozen=True)
class RowHiding:
    """Zeros in place of rows, so that features alone make a usable vector of an item.

    In training a row is hidden with probability `row_dropout`, once a step for all places of the
    item (Volkovs et al. 2017, DropoutNet, section 4). Of an item that training never saw, the row
    is always hidden.

    Attributes:
        num_trained: items with a training interaction; dense ids count these first.
    """

    row_dropout: float
    num_trained: int

    def __call__(self, ids: Tensor, rows: Tensor, noise: RowNoise | None) -> Tensor:
        """(N, D) of items (N,) int64 with rows (N, D); `noise` has a row an item, None hides none
        but those of untrained items."""
        is_hidden = ids >= self.num_trained
        if noise is not None and self.row_dropout:
            lot = noise.per_row("row_dropout", 1).squeeze(1)
            is_hidden = is_hidden | (lot < self.row_dropout)
        return torch.where(is_hidden.unsqueeze(1), 0.0, rows)


class ItemContent(nn.Module):
    """row + Σ of the features' vectors, so that an item without a trained row has a vector too."""

    def __init__(self, features: EntityFeatures, dim: int, hiding: RowHiding) -> None:
        super().__init__()
        self.hiding = hiding
        self.features = FeatureEncoder(features, dim)

    def forward(self, ids: Tensor, rows: Tensor, noise: RowNoise | None = None) -> Tensor:
        """(N, D) of items (N,) int64 with rows (N, D); `noise` as `RowHiding` wants it.

        Each item should stand among `ids` once, else its features are encoded as often.
        """
        return self.hiding(ids, rows, noise) + self.features(ids).sum(1)

    def over(self, features: EntityFeatures) -> ItemContent:
        """Of other items, none of which training saw."""
        other = copy.copy(self)
        other._modules = {**self._modules, "features": self.features.over(features)}
        other.hiding = replace(self.hiding, num_trained=0)
        return other
