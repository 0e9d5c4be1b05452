"""Where a table's rows are to live and what updates them, settled before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_pt.config import TableConfig

# What every placement has alike; a sharded table has it fused into backward.
TABLE_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")
# TorchRec has them on CUDA alone, and for pooled lookups; elsewhere there is what follows.
POOLED = {"table_row_wise": "row_wise", "grid": "column_wise"}


@dataclass(frozen=True)
class Placement:
    """A table's settled placement and optimizer.

    Attributes:
        kind: "replicated", a kind of sharding, or "planner" for what TorchRec's planner chooses.
        learning_rate: None: that of the stage.
    """

    kind: str
    optimizer: str
    learning_rate: float | None = None

    @property
    def fused(self) -> str | None:
        """The optimizer that is fused into backward; None for a replicated table."""
        return None if self.kind == "replicated" else self.optimizer

    @property
    def sharding_types(self) -> list[str]:
        """What the planner may choose, in TorchRec's words."""
        if self.kind != "planner":
            return ["grid_shard" if self.kind == "grid" else self.kind]
        by_columns = [] if self.optimizer == "rowwise_adagrad" else ["column_wise"]
        return ["table_wise", "row_wise", *by_columns]


def settle_optimizer(table: TableConfig, num_items: int, dim: int) -> str:
    """Resolve the optimizer `auto`: alike on every device and for any number of ranks."""
    if table.optimizer != "auto":
        return table.optimizer
    return "adamw" if _settle_kind(table, num_items, dim) == "replicated" else "rowwise_adagrad"


def settle_placement(table: TableConfig, num_items: int, dim: int, device_type: str) -> Placement:
    """Resolve `auto`, and refuse what cannot be trained.

    Args:
        device_type: "cpu" or "cuda".
    Raises:
        ValueError: a placement that the device lacks, or an optimizer that does not go with it.
    """
    kind, optimizer = _settle_kind(table, num_items, dim), settle_optimizer(table, num_items, dim)
    if kind in POOLED and device_type != "cuda":
        raise ValueError(
            f"model.item_table: {kind} is for CUDA alone, this is {device_type}; set placement to "
            f'"{POOLED[kind]}", or to "planner"'
        )
    if kind != "replicated" and optimizer == "adamw":
        which = "sharded" if kind == "planner" else kind
        raise ValueError(
            f"model.item_table: a {which} table fuses its optimizer into backward, where CPU has "
            'no adamw; set optimizer to "rowwise_adagrad", or placement to "replicated"'
        )
    if kind in ("column_wise", "grid") and optimizer == "rowwise_adagrad":
        raise ValueError(
            "model.item_table: rowwise_adagrad keeps one state per column shard and is not exact "
            f'under {kind}; set optimizer to "adagrad" or "sgd"'
        )
    return Placement(kind, optimizer, table.learning_rate)


def _settle_kind(table: TableConfig, num_items: int, dim: int) -> str:
    if table.placement != "auto":
        return table.placement
    megabytes = num_items * dim * 4 / 2**20
    # Whoever names an optimizer of sharded tables had a sharded table in mind.
    is_small = megabytes < table.replicated_max_mb and table.optimizer not in TABLE_OPTIMIZERS
    return "replicated" if is_small else "row_wise"
