"""The sharding plan of a model as it was built: where each table lives and what it takes there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from torchrec_pt.checkpoint import parts_of
from torchrec_pt.distributed import gather_objects
from torchrec_pt.files import write_json

# How TorchRec's collections name the weights of their tables.
_TABLE = re.compile(r"\.(?:embeddings|embedding_bags)\.([^.]+)\.weight$")


@dataclass(frozen=True)
class TablePlan:
    """One table.

    Attributes:
        kind: replicated, or TorchRec's kind of sharding.
        bytes_per_rank: of the weights and the optimizer's state, in rank order; gradients aside.
    """

    table: str
    rows: int
    dim: int
    kind: str
    bytes_per_rank: list[int]

    @property
    def ranks(self) -> list[int]:
        """Those that hold a part of it."""
        return [rank for rank, num_bytes in enumerate(self.bytes_per_rank) if num_bytes]


def table_plans(
    model: DistributedModelParallel, optimizer_state: Mapping[str, Tensor]
) -> list[TablePlan]:
    """What the ranks hold of every table, from the tensors themselves; all ranks call it.

    Args:
        optimizer_state: of `Optimizers.state`, named "<parameter>.<what>".
    """
    weights = {name: value for name, value in model.state_dict().items() if _TABLE.search(name)}
    held = {
        name: _local_bytes(weight)
        + sum(_local_bytes(v) for n, v in optimizer_state.items() if n.startswith(f"{name}."))
        for name, weight in weights.items()
    }
    of_ranks = gather_objects(held)
    kinds = {
        f"{module}.embeddings.{table}.weight": sharding.sharding_type
        for module, tables in model.plan.plan.items()
        for table, sharding in tables.items()
    }
    plans = []
    for name, weight in weights.items():
        found = _TABLE.search(name)
        assert found is not None
        plans.append(
            TablePlan(
                table=found[1],
                rows=weight.size(0),
                dim=weight.size(1),
                kind=kinds.get(name, "replicated"),
                bytes_per_rank=[rank[name] for rank in of_ranks],
            )
        )
    return plans


def _local_bytes(value: Tensor) -> int:
    return sum(part.nbytes for _, part in parts_of(value))


def write_plan(path: Path, plans: list[TablePlan]) -> None:
    """As JSON: one object a table."""
    write_json(path, [asdict(plan) | {"ranks": plan.ranks} for plan in plans])


def render_plan(plans: list[TablePlan]) -> Table:
    """One row a table; megabytes (2^20 bytes) of a rank, from the least to the most."""
    table = Table(title="Tables", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("table", "rows", "dim", "kind", "ranks", "MB per rank"):
        is_number = name in ("rows", "dim", "MB per rank")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    for plan in plans:
        held = [plan.bytes_per_rank[rank] / 2**20 for rank in plan.ranks]
        least, most = (f"{megabytes:.3g}" for megabytes in (min(held), max(held)))
        table.add_row(
            plan.table,
            f"{plan.rows:,}",
            str(plan.dim),
            plan.kind,
            _ranges(plan.ranks),
            least if least == most else f"{least}–{most}",
        )
    return table


def is_worth_showing(plans: list[TablePlan]) -> bool:
    """Several ranks, or a sharded table; that a lone process holds its tables tells nobody much."""
    return any(plan.kind != "replicated" or len(plan.bytes_per_rank) > 1 for plan in plans)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0–2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)
