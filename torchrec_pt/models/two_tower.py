"""Two towers: one for users, from their features and pooled history, one for items.

Covington, Adams, Sargin 2016 (YouTube, section 3: a history as the mean of its item
embeddings) and Yi et al. 2019 (two towers joined by an inner product). Each tower adds to its
base, the pooled history or the item's row, what an MLP makes of base and features, little
at first: it starts near matrix factorization.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import TwoTowerConfig
from torchrec_pt.data.entity_features import EntityFeatures
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.models.item_content import RowHiding
from torchrec_pt.rng import RowNoise


class TwoTower(Backbone):
    def __init__(
        self,
        config: TwoTowerConfig,
        num_items: int,
        user_features: EntityFeatures,
        item_features: EntityFeatures,
        hiding: RowHiding | None = None,
    ) -> None:
        super().__init__(config, config.history_length, num_items)
        self.dropout = config.dropout
        self.hiding = hiding
        self.user_features = FeatureEncoder(user_features, config.dim)
        self.item_features = FeatureEncoder(item_features, config.dim)
        self.user_tower = Tower(config.dim, self.user_features.num_fields, config.hidden_dims)
        self.item_tower = Tower(config.dim, self.item_features.num_fields, config.hidden_dims)

    def represent(self, ids: Tensor, rows: Tensor, noise: RowNoise | None = None) -> Tensor:
        """Rows, some of them hidden; the item tower reads the features."""
        return rows if self.hiding is None else self.hiding(ids, rows, self.heard(noise))

    def over_new_items(self, features: EntityFeatures) -> TwoTower | None:
        if self.hiding is None:
            return None
        other = copy.copy(self)
        other._modules = {**self._modules, "item_features": self.item_features.over(features)}
        other.hiding = replace(self.hiding, num_trained=0)
        return other

    def layers(self) -> list[dict[str, list[str]]]:
        embeddings = {
            "item table": ["items"],
            "item content": ["item_features"],
            "user features": ["user_features"],
        }
        towers = ("user_tower", "item_tower")
        hidden = [
            {f"layer {i + 1}": [f"{tower}.hidden.{i}" for tower in towers]}
            for i in range(len(self.user_tower.hidden))
        ]
        return [embeddings, *hidden, {"output": [f"{tower}.out" for tower in towers]}]

    def encode_items(self, ids: Tensor, rows: Tensor) -> Tensor:
        return self.scaled(self.item_tower(rows, self.item_features(ids)))

    def encode_users(
        self,
        users: Tensor,
        history: Jagged,
        noise: RowNoise | None = None,
        *,
        is_masked: Tensor | None = None,
    ) -> Tensor:
        if is_masked is not None:
            history = history.filter(~is_masked)
        place = torch.arange(len(users), device=users.device)
        drop = RowDropout(self.dropout, self.heard(noise), "two_tower.dropout", place, 0 * place)
        user = self.user_tower(drop(mean_of_rows(history)), self.user_features(users), drop)
        return self.scaled(user)


class Tower(nn.Module):
    """base + MLP(base, fields)."""

    def __init__(self, dim: int, num_fields: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        widths = [(1 + num_fields) * dim, *hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.out = nn.Linear(widths[-1], dim)
        nn.init.normal_(self.out.weight, std=0.02)  # small beside the base, as its rows are
        nn.init.zeros_(self.out.bias)

    def forward(
        self, base: Tensor, fields: Tensor, drop: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        """base (B, D), fields (B, F, D) -> (B, D)"""
        x = torch.cat([base, fields.flatten(1)], dim=1)
        for layer in self.hidden:
            x = drop(F.gelu(layer(x)))
        return base + self.out(x)


def mean_of_rows(jagged: Jagged) -> Tensor:
    """(R, …) mean of each row's values (T, …); zeros for an empty row."""
    sums = torch.segment_reduce(jagged.values, "sum", offsets=jagged.offsets, initial=0.0)
    return sums / jagged.lengths.clamp(min=1).view(-1, *[1] * (jagged.values.dim() - 1))
