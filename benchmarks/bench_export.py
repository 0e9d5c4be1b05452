"""Export of 1,000,000 x 64 embeddings with string ids against bare writes of the same.

    python benchmarks/bench_export.py [--threads 1] [--rounds 9] [--quick] [--only parquet|formats]

The model is a transformer of a run whose pretraining had no steps (export_run.py); what is timed
is the library's own export of it, loaded: vectors, lengths, files, hashes, fsync and manifest.

- parquet: in turns with pyarrow's write_table of the same columns, which lie in memory, at its
  defaults and with the settings of the export (snappy, no dictionaries, row groups of 32 MB of
  vectors), and with the whole way from the run's folder, which verifies and loads the checkpoint.
- formats: the others, each with a bare write of as many bytes from memory.

CPU time, and beside it wall time, which tells of the disk and of what else the machine does. Peak
memory of the Parquet export in processes of its own (export_memory.py).
Each section has a result of its own, benchmarks/results/export_parquet.json and
export_formats.json; --quick writes one only where --out says.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bars import Bar, at_most, bar_table, without_bound
from conditions import build_parser, conditions, default_out, write_json
from export_memory import peak_memory
from export_run import DIM, build_run
from measuring import elapsed_ms, quantiles
from peak_memory import Peak
from rich.console import Console
from tables import build_table
from turn_costs import MIB

from torchrec_pt.checkpoint import rows_per_block
from torchrec_pt.config import IndexConfig
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.export import export_embeddings
from torchrec_pt.export.embeddings import Asked, write_embeddings
from torchrec_pt.export.vectors import all_items
from torchrec_pt.served import Served, load_served

SECTIONS = ("parquet", "formats")
NUM_ITEMS, NUM_ITEMS_QUICK, NUM_ITEMS_SMALL = 1_000_000, 50_000, 10_000
OURS, WHOLE, SAME, DEFAULT = "export", "export from the folder", "write_table, same", "write_table"
# Format, dtype, kind of index. The graph of hnsw and the lists of ivf take FAISS minutes.
FORMATS = (
    ("npy", "float32", ""),
    ("safetensors", "float32", ""),
    ("parquet", "float16", ""),
    ("safetensors", "bfloat16", ""),
    ("parquet", "int8", ""),
    ("safetensors", "int8", ""),
    ("csv", "float32", ""),
    ("jsonl", "float32", ""),
    ("faiss", "float32", "flat"),
    ("faiss", "float32", "pq"),
)


@dataclass(frozen=True)
class Row:
    what: str
    megabytes: float
    rounds: int
    cpu_p20_ms: float
    cpu_p50_ms: float
    cpu_p80_ms: float
    wall_p20_ms: float
    wall_p50_ms: float
    wall_p80_ms: float


@dataclass(frozen=True)
class Step:
    do: Callable[[], object]
    written: Path
    rounds: int


def main() -> None:
    parser = build_parser(__doc__, SECTIONS, rounds_help="of parquet; a third of the others")
    parser.set_defaults(rounds=9, device="cpu")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        parser.error("--device: this benchmark is of the CPU alone")
    torch.set_num_threads(arguments.threads)
    pa.set_cpu_count(arguments.threads)
    num_items = NUM_ITEMS_QUICK if arguments.quick else NUM_ITEMS
    console = Console(width=max(Console().width, 120))
    header = conditions(arguments.device) | {"num_items": num_items, "dim": DIM}
    with tempfile.TemporaryDirectory() as name, joined_ranks() as ranks:
        run_dir = build_run(Path(name) / "large", num_items)
        for section in SECTIONS if arguments.only is None else (arguments.only,):
            served = load_served(run_dir, ranks)
            bars: list[Bar] = []
            if section == "parquet":
                small = build_run(Path(name) / "small", NUM_ITEMS_SMALL)
                peaks = {what: peak_memory(what, run_dir, small) for what in ("loaded", "whole")}
                rows = measure(parquet_steps(served, arguments.rounds))
                bars = compute_bars(rows, peaks)
            else:
                rounds = max(1, arguments.rounds // 3)
                steps = [format_steps(served, one, rounds) for one in formats_asked(run_dir)]
                rows = [row for some in steps for row in measure(some)]
            print_tables(console, section, rows, bars)
            out = arguments.out or (None if arguments.quick else default_out(f"export_{section}"))
            if out is not None:
                found = {"bars": [asdict(bar) for bar in bars], "rows": [asdict(r) for r in rows]}
                write_json(out, header, found)


def parquet_steps(served: Served, rounds: int) -> dict[str, Step]:
    folder = served.config.run_dir / "bare"
    folder.mkdir()
    table = same_columns(served)
    settings: dict[str, Any] = {
        "use_dictionary": False,
        "row_group_size": rows_per_block((DIM,), torch.float32),
    }
    asked = Asked("items", "parquet", "float32", IndexConfig(), None, None)
    target = asked.path(served.config.run_dir)
    same, default = folder / "same.parquet", folder / "default.parquet"
    return {
        OURS: Step(partial(write_embeddings, served, asked), target, rounds),
        SAME: Step(partial(pq.write_table, table, same, **settings), same, rounds),
        DEFAULT: Step(partial(pq.write_table, table, default), default, rounds),
        WHOLE: Step(
            partial(export_embeddings, served.config.run_dir, "items"), target, max(1, rounds // 3)
        ),
    }


def same_columns(served: Served) -> pa.Table:
    vectors = torch.cat(list(all_items(served.learner.backbone, served.ranks)))
    values = pa.array(vectors.flatten().numpy())
    return pa.table(
        {
            "id": served.dataset.items["external_id"].to_arrow(),
            "embedding": pa.FixedSizeListArray.from_arrays(values, DIM),
        }
    )


def formats_asked(run_dir: Path) -> list[Asked]:
    out = run_dir / "formats"
    return [
        Asked("items", format, dtype, IndexConfig(kind=kind or "flat"), None, out)  # type: ignore[arg-type]
        for format, dtype, kind in FORMATS
    ]


def format_steps(served: Served, asked: Asked, rounds: int) -> dict[str, Step]:
    """An export, and a bare write of as many bytes as its main file has."""
    path = asked.path(served.config.run_dir)
    name = f"{asked.format} {asked.dtype}"
    if asked.format == "faiss":
        name, rounds = f"faiss {asked.index.kind}", 1
    content: list[bytes] = []

    def copy() -> None:
        if not content:
            content.append(path.read_bytes())
        path.with_name("copy").write_bytes(content[0])

    return {
        name: Step(partial(write_embeddings, served, asked), path, rounds),
        f"{name}: bytes": Step(copy, path, rounds),
    }


def measure(steps: dict[str, Step]) -> list[Row]:
    """In turns, in the order given; the first round warms up where there are several."""
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    is_warm = all(step.rounds == 1 for step in steps.values())
    for turn in range(max(step.rounds for step in steps.values()) + (not is_warm)):
        for name, step in steps.items():
            if turn > step.rounds - is_warm:
                continue
            start = time.perf_counter()
            found = elapsed_ms(step.do, "cpu")
            if turn or is_warm:
                cpu[name].append(found)
                wall[name].append((time.perf_counter() - start) * 1000)
    return [
        Row(
            name,
            round(step.written.stat().st_size / 1e6, 1),
            len(cpu[name]),
            *quantiles(cpu[name]),
            *quantiles(wall[name]),
        )
        for name, step in steps.items()
    ]


def compute_bars(rows: list[Row], peaks: dict[str, Peak]) -> list[Bar]:
    times = {
        "CPU": {row.what: row.cpu_p50_ms for row in rows},
        "wall": {row.what: row.wall_p50_ms for row in rows},
    }

    def over(ours: str, bare: str) -> list[tuple[float, str]]:
        return [(of[ours] / of[bare], clock) for clock, of in times.items()]

    loaded, whole = (
        [(round(peaks[what].extra_mib * MIB / 1e6, 1), what)] for what in ("loaded", "whole")
    )
    return [
        at_most("export over write_table with its settings", 1.5, over(OURS, SAME)),
        at_most("export over write_table", 1.5, over(OURS, DEFAULT)),
        at_most("MB beyond the loaded model", 300, loaded),
        without_bound("from the folder over write_table", over(WHOLE, DEFAULT)),
        without_bound("MB from the folder, the table in it", whole),
    ]


def print_tables(console: Console, section: str, rows: list[Row], bars: list[Bar]) -> None:
    columns = ("what", "MB", "rounds", "CPU s", "p20–p80", "wall s", "p20–p80 ")
    table = build_table(section, *columns, text_columns=("what",))
    for row in rows:
        table.add_row(
            row.what,
            f"{row.megabytes:,.1f}",
            str(row.rounds),
            f"{row.cpu_p50_ms / 1000:.2f}",
            f"{row.cpu_p20_ms / 1000:.2f}–{row.cpu_p80_ms / 1000:.2f}",
            f"{row.wall_p50_ms / 1000:.2f}",
            f"{row.wall_p20_ms / 1000:.2f}–{row.wall_p80_ms / 1000:.2f}",
        )
    console.print(table)
    if bars:
        console.print(bar_table(bars))


if __name__ == "__main__":
    main()
