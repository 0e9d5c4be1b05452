"""torchrec-pt checkpoint: what one holds, whether it is whole, and a plain file of it."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from torchrec_pt.checkpoint import Checkpoint

app = typer.Typer(no_args_is_help=True, help="Inspect, verify or convert checkpoints.")
console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)

One = Annotated[Path, typer.Argument(help="A checkpoint's folder.", metavar="PATH")]


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def inspect(
    path: One, json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False
) -> None:
    """Tensors, position, metrics, and what made it; verified before."""
    about = _about(_open(path))
    if json_:
        print(json.dumps(about, ensure_ascii=False, indent=1))
        return
    table = Table(title=str(path), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    for name in ("shape", "dtype", "MB", "shards"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tensor in about["tensors"].items():
        shape = " × ".join(str(size) for size in tensor["shape"]) or "scalar"
        megabytes = f"{tensor['bytes'] / 1e6:,.3f}"
        table.add_row(name, shape, tensor["dtype"], megabytes, str(tensor["shards"]))
    # A name is to be read and copied whole, wider than the screen if need be.
    widest = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(widest, console.width), markup=False, highlight=False).print(table)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in about["metrics"].items())
    console.print(f"step {about['step']}, epoch {about['epoch']}; {about['items']:,} items")
    console.print(f"validated at step {about['validated_at']}: {metrics}")
    console.print(f"fingerprint {about['fingerprint']}; made by {about['made_by']}")


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    position = checkpoint.state.get("position", {})
    curve = position.get("curve", [])
    return {
        "step": position.get("step"),
        "epoch": position.get("epoch"),
        "validated_at": curve[-1]["step"] if curve else None,
        "metrics": curve[-1]["metrics"] if curve else {},
        "items": len(checkpoint.items),
        "fingerprint": checkpoint.state.get("fingerprint"),
        "made_by": checkpoint.made_by,
        "tensors": {
            name: {
                "shape": list(saved.shape),
                "dtype": str(saved.dtype).removeprefix("torch."),
                "bytes": saved.num_bytes,
                "shards": len(saved.chunks),
            }
            for name, saved in checkpoint.tensors.items()
        },
    }


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="A checkpoint, or a folder of them.", metavar="PATH")
    ],
) -> None:
    """One line a checkpoint; exit code 2 if any is bad."""
    from torchrec_pt import checkpoint as checkpoints

    paths = checkpoints.saved(path) or checkpoints.saved(path / "checkpoints") or [path]
    is_bad = False
    for one in paths:
        try:
            opened = _open(one)
        except checkpoints.CheckpointError as error:
            is_bad = True
            console.print(f"bad: {error}")
            continue
        megabytes = sum(saved.num_bytes for saved in opened.tensors.values()) / 1e6
        console.print(f"whole: {one}: {len(opened.tensors)} tensors, {megabytes:,.1f} MB")
    if is_bad:
        raise typer.Exit(2)


@app.command()
def convert(
    path: One,
    out: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT.safetensors")],
    model_only: Annotated[
        bool, typer.Option("--model-only", help="Without the optimizer's; the model's own names.")
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Of floating-point tensors.")] = None,
) -> None:
    """One plain safetensors file, which needs nothing of this package to be read."""
    import torch

    from torchrec_pt import conversion

    to = getattr(torch, dtype.value) if dtype is not None else None
    names = conversion.convert(_open(path), out, model_only=model_only, dtype=to)
    console.print(f"{out}: {len(names)} tensors, {out.stat().st_size / 1e6:,.1f} MB")


def _open(path: Path) -> Checkpoint:
    from torchrec_pt.checkpoint import Checkpoint
    from torchrec_pt.distributed import joined_ranks

    with joined_ranks() as ranks:
        return Checkpoint.open(path, ranks)
