"""What moved from a pretrained model into one that is fine-tuned, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from torchrec_pt.layer_rates import LayerRate, part_of
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.transfer import RowCounts, TransferReport


@dataclass(frozen=True)
class MovedPart:
    """A module of the model, or one that only the checkpoint has.

    Attributes:
        loaded, new, dropped: numbers taken over, only in the model, only in the checkpoint.
        rows: of a table whose rows were matched by external id or by value.
        learning_rate: before the schedule, 0 for what is frozen; None where nothing is trained.
        first_step: the step that first trains it.
    """

    name: str
    loaded: int
    new: int
    dropped: int
    rows: RowCounts | None
    learning_rate: float | None
    first_step: int

    def values(self) -> dict[str, Any]:
        """As JSON holds it."""
        rows = None if self.rows is None else self.rows._asdict()
        return {**asdict(self), "rows": rows, "training": self.training}

    @property
    def training(self) -> str:
        """The learning rate in words."""
        if self.learning_rate is None:
            return ""
        if not self.learning_rate:
            return "frozen"
        late = f" from step {self.first_step:,}" if self.first_step else ""
        return f"{self.learning_rate:.3g}{late}"


def moved_parts(
    report: TransferReport,
    backbone: Backbone,
    rates: Mapping[str, float],
    layers: Mapping[str, LayerRate],
) -> list[MovedPart]:
    """From the bottom of the model to its head; optimizers' states aside.

    Args:
        rates, layers: of the parameters that a stage trains, as in `Optimizers`.
    """
    kinds = {"loaded": report.loaded, "new": report.new, "dropped": report.dropped}
    sizes: dict[tuple[str, int], dict[str, int]] = {}
    rows: dict[str, RowCounts] = {}
    trained: dict[str, tuple[float, int]] = {}
    for kind, tensors in kinds.items():
        for tensor in tensors:
            if not tensor.startswith("model."):
                continue
            parameter = tensor.removeprefix("model.")
            part = part_of(backbone, parameter)
            size = sizes.setdefault((part.name, part.depth), dict.fromkeys(kinds, 0))
            size[kind] += report.sizes[tensor]
            if tensor in report.rows:
                counts = zip(rows.get(part.name, (0, 0, 0)), report.rows[tensor], strict=True)
                rows[part.name] = RowCounts(*(a + b for a, b in counts))
            if kind != "dropped" and parameter in rates:
                trained[part.name] = (rates[parameter], layers[parameter].first_step or 0)
    order = [name for group in backbone.layers() for name in group]
    names = sorted(sizes, key=lambda key: (-key[1], order.index(key[0]) if key[0] in order else 99))
    return [
        MovedPart(
            name,
            **sizes[name, depth],
            rows=rows.get(name),
            learning_rate=trained[name][0] if name in trained else None,
            first_step=trained[name][1] if name in trained else 0,
        )
        for name, depth in names
    ]


def render_moved(parts: list[MovedPart], title: str) -> Table:
    """One row a part; rows of tables as matched / new / dropped."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", no_wrap=True)
    for name in ("loaded", "new", "dropped", "rows", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in parts:
        numbers = [f"{num:,}" if num else "" for num in (part.loaded, part.new, part.dropped)]
        rows = "" if part.rows is None else " / ".join(f"{num:,}" for num in part.rows)
        table.add_row(part.name, *numbers, rows, part.training)
    if any(part.rows for part in parts):
        table.caption = "numbers of parameters; rows matched / new / dropped"
    return table
