"""From a user's and an item's vector to the score that ranks.

    inner     u · i
    linear    (W u) · i, W the identity to begin with
    mlp       u · i + MLP(interactions(u, i, features of both)), the MLP 0 to begin with

Every head is asked in steps, since a user is scored against many items: `of_users` and `of_items`
make queries and keys of vectors, `of_pairs` and `of_block` scores of these. All start at the
inner product, which is what pretraining left.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import InteractionName, ModelConfig, RankingConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import EntityFeatures, load_entity_features
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.models.interactions import Interactions

PAIRS_AT_A_TIME = 2**14  # of a block that the MLP scores


class InnerHead(nn.Module):
    def user_vectors(self, vectors: Tensor) -> Tensor:
        """(B, D) vectors of users as they are exported, from the backbone's (B, D)."""
        return vectors

    def of_users(self, users: Tensor, vectors: Tensor) -> Tensor:
        """(B, Q) queries of users (B,) of this rank, −1 for somebody unknown, by their vectors."""
        return self.user_vectors(vectors)

    def of_items(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """(N, K) keys of items (N,) by their vectors."""
        return vectors

    def of_pairs(self, queries: Tensor, keys: Tensor, drop: RowDropout) -> Tensor:
        """(P,) scores of P pairs, (P, Q) and (P, K)."""
        return (queries * keys).sum(1)

    def of_block(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, N) scores of every query with every key, without dropout."""
        return queries @ keys.T


class LinearHead(InnerHead):
    """Args:
    is_cosine: vectors have length 1, the mapped ones too.
    """

    def __init__(self, dim: int, *, is_cosine: bool) -> None:
        super().__init__()
        self.is_cosine = is_cosine
        self.map = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.map.weight)

    def user_vectors(self, vectors: Tensor) -> Tensor:
        mapped = self.map(vectors).to(vectors)
        return F.normalize(mapped, dim=1) if self.is_cosine else mapped


class MlpHead(InnerHead):
    """A query is the user's vector and those of the user's features, a key likewise."""

    def __init__(
        self,
        dim: int,
        users: EntityFeatures,
        items: EntityFeatures,
        interactions: Sequence[InteractionName],
        hidden_dims: Sequence[int],
    ) -> None:
        super().__init__()
        self.dim = dim
        self.users, self.items = FeatureEncoder(users, dim), FeatureEncoder(items, dim)
        num_fields = self.users.num_fields + self.items.num_fields
        self.interactions = Interactions(interactions, dim, num_fields)
        widths = [self.interactions.out_dim, *hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        # A bias would move all of a list alike: its gradient is what rounding leaves of 0.
        self.out = nn.Linear(widths[-1], 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def of_users(self, users: Tensor, vectors: Tensor) -> Tensor:
        return torch.cat([vectors, self.users(users).flatten(1)], dim=1)

    def of_items(self, ids: Tensor, vectors: Tensor) -> Tensor:
        return torch.cat([vectors, self.items(ids).flatten(1)], dim=1)

    def of_pairs(self, queries: Tensor, keys: Tensor, drop: RowDropout) -> Tensor:
        user, user_fields = queries.tensor_split([self.dim], dim=1)
        item, item_fields = keys.tensor_split([self.dim], dim=1)
        fields = torch.cat([user_fields, item_fields], dim=1).unflatten(1, (-1, self.dim))
        x = self.interactions(user, item, fields)
        for layer in self.hidden:
            x = drop(F.gelu(layer(x)))
        return (user * item).sum(1) + self.out(x).squeeze(1).to(user)

    def of_block(self, queries: Tensor, keys: Tensor) -> Tensor:
        """In blocks of PAIRS_AT_A_TIME or fewer pairs, cut by the shapes alone."""
        none = keys.new_zeros(0, dtype=torch.int64)
        drop = RowDropout(0.0, None, "", none, none)
        size = max(1, PAIRS_AT_A_TIME // max(1, len(keys)))
        blocks = [
            self.of_pairs(
                some.repeat_interleave(len(keys), dim=0), keys.repeat(len(some), 1), drop
            ).unflatten(0, (len(some), len(keys)))
            for some in queries.split(size)
        ]
        return torch.cat(blocks)


def build_head(config: RankingConfig, model: ModelConfig, dataset: PreparedDataset) -> InnerHead:
    """The configured head; the MLP's initial values from torch's generator."""
    if config.head == "linear":
        return LinearHead(model.dim, is_cosine=model.similarity == "cosine")
    if config.head == "mlp":
        users, items = (load_entity_features(dataset, of) for of in ("user", "item"))
        return MlpHead(model.dim, users, items, config.interactions, config.hidden_dims)
    return InnerHead()
