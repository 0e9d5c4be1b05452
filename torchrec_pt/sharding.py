"""Where the rows of the item table live: replicated under DDP, or sharded by TorchRec."""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_pt import rng
from torchrec_pt.checkpoint import parts_of
from torchrec_pt.config import TrainConfig
from torchrec_pt.data.batch import ITEM
from torchrec_pt.distributed import Ranks, gather_objects, raised_together
from torchrec_pt.models.item_bags import ItemBagsSharder
from torchrec_pt.models.item_table import ItemTable
from torchrec_pt.placement import POOLED, Placement

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
# FBGEMM's own; the dense optimizers of torch have 1e-10 and must be told.
EPS = 1e-8

_ITEM_WEIGHT = f".embeddings.{ITEM}.weight"  # how the name of the item table's parameter ends
_BLOCK_ROWS = 1 << 14  # rows that are filled at a time


def is_item_table(parameter: str) -> bool:
    """Whether a parameter or its state in a state dict, by its name, is the item table's."""
    return parameter.endswith(_ITEM_WEIGHT)


def shard(
    module: nn.Module, placement: Placement, train: TrainConfig, ranks: Ranks
) -> DistributedModelParallel:
    """Place the module on the ranks: its item table as settled, everything else under DDP.

    The table's rows hold nothing yet; `fill_item_table` or a checkpoint gives them their values.
    A single process skips DDP.

    Raises:
        ValueError: a table that the planner cannot place.
    """
    sharder = ItemBagsSharder() if placement.kind in POOLED else EmbeddingCollectionSharder()
    sharders = [cast(ModuleSharder[nn.Module], sharder)]
    plan = ShardingPlan(plan={})
    table = next(m for m in module.modules() if isinstance(m, ItemTable))
    if placement.fused is None:
        table.collection.to_empty(device=ranks.device)
    else:
        if placement.kind in POOLED:
            table.pool()
        weight = next(table.collection.parameters())
        settings = {"lr": placement.learning_rate or train.learning_rate}
        if placement.fused != "sgd":
            settings["eps"] = EPS
        _apply_optimizer_in_backward(FUSED_OPTIMIZERS[placement.fused], [weight], settings)
        num_nodes = ranks.world_size // ranks.local_world_size
        num_parts = num_nodes if placement.kind == "grid" else ranks.world_size
        planner = EmbeddingShardingPlanner(
            topology=_topology(ranks),
            constraints={
                ITEM: ParameterConstraints(
                    sharding_types=placement.sharding_types,
                    # TorchRec's own is 128 columns, which would leave most tables whole.
                    min_partition=max(4, -(-weight.shape[1] // num_parts)),
                )
            },
            storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        )
        plan = _planned(planner, module, sharders, ranks)
    model = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=ranks.device,
        plan=plan,
        sharders=sharders,
        init_data_parallel=ranks.world_size > 1,
    )
    _look_up_bags_of_one(model)
    if ranks.world_size == 1:
        model.module.to(ranks.device)  # what DDP would have done
    return model


def _planned(
    planner: EmbeddingShardingPlanner,
    module: nn.Module,
    sharders: list[ModuleSharder[nn.Module]],
    ranks: Ranks,
) -> ShardingPlan:
    """The first rank's plan; what it cannot plan is raised on every rank."""
    plan: ShardingPlan | None = None
    with raised_together():
        if ranks.is_first:
            try:
                plan = planner.plan(module, sharders)
            except PlannerError as error:
                raise ValueError(
                    "model.item_table: TorchRec's planner finds no room for it "
                    f"({error.error_type.value}); use more ranks, a smaller dim, or a placement "
                    'that splits it, such as "row_wise"'
                ) from None
    plan = gather_objects(plan)[0]
    assert plan is not None
    return plan


def _topology(ranks: Ranks) -> Topology:
    hbm_bytes = None
    if ranks.device.type == "cuda":  # the planner would take every GPU for one of 32 GB
        hbm_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            hbm_cap_bytes=hbm_bytes,
        ),
        kernel_config=KernelConfig(compute_device=ranks.device.type),
    )


def _look_up_bags_of_one(model: nn.Module) -> None:
    """Turn the unpooled lookups of sharded tables on CPU into pooled ones of one id a bag.

    The rows and the updates are the same. But FBGEMM's CPU backward of an unpooled lookup keeps
    a vector for each row in hash maps, and takes seven times as long (2.5 µs a row of 32).
    """
    collections = [m for m in model.modules() if isinstance(m, ShardedEmbeddingCollection)]
    lookups = nn.ModuleList(lookup for table in collections for lookup in table._lookups)
    for kernel in lookups.modules():
        if (
            isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen)
            and kernel.use_cpu
            and kernel.is_nobag
            and len(kernel.feature_table_map) == 1  # several would be pooled side by side
        ):
            kernel.pooling_mode, kernel.is_nobag = PoolingMode.SUM, False
            kernel.register_forward_pre_hook(_one_id_a_bag, with_kwargs=True)


def _one_id_a_bag(
    kernel: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    indices = kwargs["indices"]
    return args, kwargs | {"offsets": torch.arange(len(indices) + 1, device=indices.device)}


@torch.no_grad()
def fill_item_table(model: DistributedModelParallel, seed: int) -> None:
    """Normal rows of deviation 0.02, each a function of (seed, row): alike in any placement."""
    for name, value in model.state_dict().items():
        if not is_item_table(name):
            continue
        for (first_row, first_column), part in parts_of(value):
            _fill(part, first_row, first_column, value.size(1), seed)


def _fill(part: Tensor, first_row: int, first_column: int, dim: int, seed: int) -> None:
    """Fill a part of a table of `dim` columns, in blocks: the hashes of a row take several rows."""
    columns = slice(first_column, first_column + part.shape[1])
    for begin in range(0, len(part), _BLOCK_ROWS):
        block = part[begin : begin + _BLOCK_ROWS]
        rows = torch.arange(len(block), device=part.device) + first_row + begin
        block.copy_(rng.normal_rows(rows, dim, seed, "item_table")[:, columns] * INIT_STD)
