"""The face that every backbone shows to objectives, tasks, evaluation and export."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import BackboneConfig
from torchrec_pt.data.entity_features import EntityFeatures
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.item_content import ItemContent
from torchrec_pt.models.item_table import ItemTable
from torchrec_pt.rng import RowNoise


class Backbone(nn.Module, ABC):
    """Vectors of users and items whose inner product ranks.

    Attributes:
        items: the item table. Callers look it up once a step, `represent` what they found, and
            hand that in where "rows" are asked for.
        content: what makes item features part of an item's row; None where none are.
        history_length: newest items of a history that `encode_users` reads; callers cut.
        reads_times: whether the times of a history make a difference.
        is_frozen: whether it keeps its pretrained values; it then drops nothing and
            stays in evaluation mode.
    """

    reads_times = False
    is_frozen = False

    def __init__(
        self,
        config: BackboneConfig,
        history_length: int,
        num_items: int,
        content: ItemContent | None = None,
    ) -> None:
        super().__init__()
        self.dim = config.dim
        self.is_cosine = config.similarity == "cosine"
        self.content = content
        self.history_length = history_length
        self.items = ItemTable(num_items, config.row_dim)

    def represent(self, ids: Tensor, rows: Tensor, noise: RowNoise | None = None) -> Tensor:
        """Rows (N, row_dim) of the item table with the content of their items (N,) int64 in them.

        Args:
            noise: of row_dropout, one row an item; None outside training.
        """
        return rows if self.content is None else self.content(ids, rows, self.heard(noise))

    @torch.no_grad()
    def encode_new_items(self, features: EntityFeatures, device: torch.device) -> Tensor:
        """(N, D) vectors of N items that the model was not made with, by their features alone.

        Args:
            device: where the model is.
        Raises:
            ValueError: the model reads no item features.
        """
        model = self.over_new_items(features)
        if model is None:
            raise ValueError(
                "new items: the model reads no item features, so nothing is known of an item "
                "without a row; train one with model.item_content and item features"
            )
        ids = torch.arange(features.num_rows, device=device)
        rows = torch.zeros(len(ids), self.items.dim, device=device)
        return model.encode_items(ids, model.represent(ids, rows))

    def over_new_items(self, features: EntityFeatures) -> Backbone | None:
        """The same model, to encode other items with; None where it reads no item features."""
        if self.content is None:
            return None
        other = copy.copy(self)
        other._modules = {**self._modules, "content": self.content.over(features)}
        return other

    def heard(self, noise: RowNoise | None) -> RowNoise | None:
        """What the randomness of a step comes to: a frozen backbone has none."""
        return None if self.is_frozen else noise

    def scaled(self, vectors: Tensor) -> Tensor:
        """As they are compared: (N, D) of length 1 where `similarity` is the cosine."""
        return F.normalize(vectors, dim=1) if self.is_cosine else vectors

    @abstractmethod
    def layers(self) -> list[dict[str, list[str]]]:
        """The groups of layers that transfer tells apart, from the bottom to the top.

        A group is the names of its parts, and of each part those of its modules and parameters;
        every parameter of the backbone is in one of them.
        """

    @abstractmethod
    def encode_items(self, ids: Tensor, rows: Tensor) -> Tensor:
        """(N, D) item vectors.

        Args:
            ids: (N,) int64 dense item ids.
            rows: (N, row_dim) their rows of the item table, as `represent` gives them.
        """

    @abstractmethod
    def encode_users(
        self,
        users: Tensor,
        history: Jagged,
        noise: RowNoise | None = None,
        *,
        is_masked: Tensor | None = None,
    ) -> Tensor:
        """(R, D): what a user with this history takes next.

        Args:
            users: (R,) int64 users of this rank; −1 for somebody of whom nothing else is known.
            history: R rows of such item rows (T, row_dim), oldest first, at most `history_length`
                each, with their times where they are known; a row may be empty.
            noise: dropout's randomness, one row a user; None for no dropout.
            is_masked: (T,) bool, items of the history to hide.
        """
