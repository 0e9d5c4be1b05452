"""Where the rows of the item table live: replicated under DDP, or sharded by TorchRec."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_pt import rng
from torchrec_pt.config import TableConfig, TrainConfig
from torchrec_pt.data.batch import ITEM
from torchrec_pt.distributed import Ranks

# TorchRec and torch speak at every start of things that their user can do nothing about.
logging.getLogger("torchrec.distributed.planner").setLevel(logging.WARNING)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
for _message in ("`broadcast_buffers` is deprecated", "Please use DTensor instead"):
    warnings.filterwarnings("ignore", message=_message, category=FutureWarning)

INIT_STD = 0.02  # as BERT4Rec, section 3.6

FUSED_OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}


@dataclass(frozen=True)
class Placement:
    """A table's settled placement and optimizer; `fused` is None for a replicated table."""

    kind: str
    optimizer: str
    fused: type[torch.optim.Optimizer] | None


def settle_placement(table: TableConfig, num_items: int, dim: int) -> Placement:
    """Resolve `auto`, and refuse what cannot be trained.

    Raises:
        ValueError: a placement and an optimizer that do not go together.
    """
    kind, optimizer = table.placement, table.optimizer
    if kind == "auto":
        megabytes = num_items * dim * 4 / 2**20
        # An optimizer that only a sharded table has decides for one.
        is_small = megabytes < table.replicated_max_mb and optimizer not in FUSED_OPTIMIZERS
        kind = "replicated" if is_small else "row_wise"
    if optimizer == "auto":
        optimizer = "adamw" if kind == "replicated" else "rowwise_adagrad"
    if kind == "replicated" and optimizer != "adamw":
        raise ValueError(
            f"model.item_table: a replicated table is updated by adamw, given {optimizer}; "
            'set placement to "row_wise", or optimizer to "adamw"'
        )
    if kind != "replicated" and optimizer == "adamw":
        raise ValueError(
            f"model.item_table: a {kind} table fuses its optimizer into backward, where CPU has no "
            'adamw; set optimizer to "rowwise_adagrad", or placement to "replicated"'
        )
    if kind == "column_wise" and optimizer == "rowwise_adagrad":
        raise ValueError(
            "model.item_table: rowwise_adagrad keeps one state per column shard and is not exact "
            'under column_wise; set optimizer to "adagrad" or "sgd"'
        )
    return Placement(kind, optimizer, FUSED_OPTIMIZERS.get(optimizer))


def shard(
    module: nn.Module, placement: Placement, table: TableConfig, train: TrainConfig, ranks: Ranks
) -> DistributedModelParallel:
    """Place the module on the ranks: its item table as settled, everything else under DDP.

    The table's rows hold nothing yet; `fill_item_table` or a checkpoint gives them their values.
    A single process skips DDP.
    """
    sharders = [cast(ModuleSharder[nn.Module], EmbeddingCollectionSharder())]
    plan = ShardingPlan(plan={})
    collection = next(m for m in module.modules() if isinstance(m, EmbeddingCollection))
    if placement.fused is None:
        collection.to_empty(device=ranks.device)
    else:
        weight = collection.embeddings[ITEM].weight
        rate = table.learning_rate or train.learning_rate
        _apply_optimizer_in_backward(placement.fused, [weight], {"lr": rate})
        planner = EmbeddingShardingPlanner(
            topology=_topology(ranks),
            constraints={ITEM: ParameterConstraints(sharding_types=[placement.kind])},
            storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        )
        plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    model = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=ranks.device,
        plan=plan,
        sharders=sharders,
        init_data_parallel=ranks.world_size > 1,
    )
    if ranks.world_size == 1:
        model.module.to(ranks.device)  # what DDP would have done
    return model


def _topology(ranks: Ranks) -> Topology:
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
        ),
        kernel_config=KernelConfig(compute_device=ranks.device.type),
    )


@torch.no_grad()
def fill_item_table(model: DistributedModelParallel, seed: int) -> None:
    """Normal rows of deviation 0.02, each a function of (seed, row): alike in any placement."""
    for name, value in model.state_dict().items():
        if not name.endswith(f"{ITEM}.weight"):
            continue
        if isinstance(value, ShardedTensor):
            for part in value.local_shards():
                (row, column), (num_rows, num_columns) = (
                    part.metadata.shard_offsets,
                    part.metadata.shard_sizes,
                )
                filled = _initial_rows(row, num_rows, value.size(1), seed, part.tensor.device)
                part.tensor.copy_(filled[:, column : column + num_columns])
        else:
            value.copy_(_initial_rows(0, len(value), value.shape[1], seed, value.device))


def _initial_rows(begin: int, num_rows: int, dim: int, seed: int, device: torch.device) -> Tensor:
    rows = torch.arange(begin, begin + num_rows, device=device)
    return rng.normal_rows(rows, dim, seed, "item_table") * INIT_STD
