"""torchrec-pt export-model and quantize: a run's models as programs, and what int8 costs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from torchrec_pt.config_file import load_config

if TYPE_CHECKING:
    from torchrec_pt.quantization import Quantized

console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)

Run = Annotated[Path, typer.Argument(help="The run's TOML file, or its folder.", metavar="RUN")]


class Format(str, Enum):
    pt2 = "pt2"
    aoti = "aoti"
    onnx = "onnx"


class Quantization(str, Enum):
    int8 = "int8"


def export_model(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="A folder; default: model in that of the run.")
    ] = None,
    formats: Annotated[
        list[Format] | None,
        typer.Option(
            "--format", help="torch.export, AOTInductor or ONNX; repeatable; default: pt2."
        ),
    ] = None,
    quantize: Annotated[
        Quantization | None, typer.Option(help="A byte an element of every table.")
    ] = None,
) -> None:
    """Encoders and scorers as programs that run without this package."""
    from torchrec_pt.programs.export import export_model as export

    folder = export(
        _run_dir(run),
        out,
        formats=[one.value for one in formats or (Format.pt2,)],
        quantize="int8" if quantize is not None else None,
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    console.print(f"export-model: {folder}: {size / 1e6:,.1f} MB; model.json says what is there")


def quantize(run: Run) -> None:
    """Test a run's models with int8 tables, beside the same ones in float32."""
    from torchrec_pt.quantization import quantize_run

    _print_quantized(quantize_run(_run_dir(run)))


def _run_dir(run: Path) -> Path:
    return load_config(run).run_dir if run.is_file() else run


def _print_quantized(found: dict[str, Quantized]) -> None:
    table = Table(
        title="On the test split",
        caption="loss: int8 − float32, ± 95 % paired over users",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("float32", "int8", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, one in found.items():
        for metric, value in one.float32.items():
            loss, half_width = one.loss[metric]
            table.add_row(
                task,
                metric.upper(),
                f"{value:.4f}",
                f"{one.int8[metric]:.4f}",
                f"{loss:+.4f} ± {half_width:.4f}",
            )
        before, after = (size / 1e6 for size in one.table_bytes)
        table.add_row(task, "tables, MB", f"{before:,.3f}", f"{after:,.3f}", "")
        table.add_section()
    console.print(table)
