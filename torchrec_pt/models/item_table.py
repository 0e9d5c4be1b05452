"""The item embeddings: a TorchRec collection whose row is the dense item id."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_pt.data.batch import ITEM, lookup_ids
from torchrec_pt.models.item_bags import ItemBags


class ItemTable(nn.Module):
    """(num_items, dim) float32 embeddings, on every rank or sharded over them.

    Built on the meta device: `sharding.shard` decides where the rows live and then fills
    them by row number, so that every placement starts from the same values.

    Attributes:
        is_frozen: whether a step's lookup has no gradient, so that a fused optimizer, whose state
            would move at a learning rate of 0 too, does nothing.
    """

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.dim = dim
        self.is_pooled = False
        self.is_frozen = False
        config = EmbeddingConfig(
            name=ITEM, num_embeddings=num_items, embedding_dim=dim, feature_names=[ITEM]
        )
        self.collection: EmbeddingCollection | ItemBags = EmbeddingCollection(
            tables=[config], device=torch.device("meta")
        )

    def pool(self) -> None:
        """Before it is sharded: make it one of bags of one item, which gives the same rows."""
        config = EmbeddingBagConfig(
            name=ITEM, num_embeddings=self.num_items, embedding_dim=self.dim, feature_names=[ITEM]
        )
        self.collection = ItemBags(tables=[config], device=torch.device("meta"))
        self.is_pooled = True

    @property
    def is_sharded(self) -> bool:
        return not isinstance(self.collection, EmbeddingCollection)

    @property
    def weight(self) -> Tensor:
        """(num_items, dim), of a table that is not sharded."""
        assert isinstance(self.collection, EmbeddingCollection)
        return self.collection.embeddings[ITEM].weight

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        """(T, dim) rows in the order of ids. With a sharded table every rank must call."""
        found = self.collection(ids)
        return found.values() if self.is_pooled else found[ITEM].values()

    def rows(self, begin: int, end: int) -> Tensor:
        """(end − begin, dim) consecutive rows; each rank of a sharded table asks for its own."""
        if not self.is_sharded:
            return self.weight[begin:end]
        device = next(self.collection.parameters()).device
        return self(lookup_ids(torch.arange(begin, end, device=device)))
