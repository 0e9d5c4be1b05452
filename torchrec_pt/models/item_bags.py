"""The item table as bags of one item each: some shardings exist for pooled lookups alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import comm
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import Awaitable, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_POOLED, _UNPOOLED = "embedding_bags.", "embeddings."  # what TorchRec's collections call tables


class ItemBags(EmbeddingBagCollection):
    """Holds the item table until it is sharded; a type of its own, since feature tables stay."""


class ShardedItemBags(ShardedEmbeddingBagCollection):
    """Takes and gives what a sharded EmbeddingCollection does: the sum of one row is the row.

    The weight and its optimizer's state are named as there, so that checkpoints go from one
    placement to another.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_state_dict_post_hook(_name_as_unpooled)
        for _, optimizer in self._optim.optimizers:
            optimizer.params = {
                name.replace(_POOLED, _UNPOOLED, 1): weight
                for name, weight in optimizer.params.items()
            }

    def input_dist(self, ctx: Any, features: Any) -> Awaitable[Any]:
        """Args: features: one row of T ids; they become T rows of one."""
        ids = features.values()
        bags = KeyedJaggedTensor(
            keys=features.keys(), values=ids, lengths=torch.ones_like(ids, dtype=torch.int64)
        )
        return super().input_dist(ctx, bags)


def _name_as_unpooled(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + _POOLED)]:
        state[prefix + _UNPOOLED + name.removeprefix(prefix + _POOLED)] = state.pop(name)


def _forget_left_groups() -> None:
    """TorchRec keeps the groups within and across nodes even when the process group is left."""
    for name in ("_INTRA_PG", "_CROSS_PG"):
        if getattr(comm, name) not in dist.distributed_c10d._world.pg_map:
            setattr(comm, name, None)


class ItemBagsSharder(EmbeddingBagCollectionSharder):
    """Shards `ItemBags`, and no other EmbeddingBagCollection."""

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedItemBags:
        _forget_left_groups()
        return ShardedItemBags(
            module, params, env, self.fused_params, device, module_fqn=module_fqn
        )

    @property
    def module_type(self) -> type[EmbeddingBagCollection]:
        return ItemBags

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingBagCollection]:
        return ShardedItemBags
