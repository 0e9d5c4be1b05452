"""Preparation of 100,000 to 10,000,000 interactions, and RecBole's beside it; of 100,000,000.

    python benchmarks/bench_prepare.py [--rounds 3] [--quick]
    python benchmarks/bench_prepare.py --large

Each in processes of its own, in turns, of the same atomic file: users, items and times, no filters,
leave-one-out in the order of time. RecBole's preparation is all that comes before the training of a
sequential model (SASRec), which is a row for each prefix of a history; ours is `prepare`, whose
batches are cut from histories while training goes on. RecBole is measured up to 1,000,000
interactions; what it would take for 10,000,000 is the line through its two largest sizes. Peak
memory is the largest resident size of the process, what its imports take ("idle") in it.

--large prepares 100,000,000 interactions from Parquet, once, and nothing else.
Writes benchmarks/results/prepare.json, or prepare_large.json; of --quick only where --out says.
`make peers` installs RecBole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bars import Bar, at_most, bar_table, without_bound
from conditions import ROOT, build_parser, conditions, default_out, write_json
from ingest_log import write_inter, write_parquet
from measuring import quantiles, rotated
from peers.environments import python_of
from rich.console import Console
from tables import build_table
from turn_costs import MIB

OURS, RECBOLE = "torchrec_pt", "RecBole"
SIZES, SIZES_QUICK = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000), (10_000, 30_000, 100_000)
LARGEST_OF_RECBOLE, LARGEST_OF_RECBOLE_QUICK = 1_000_000, 30_000
LARGE, LARGE_QUICK = 100_000_000, 3_000_000
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Row:
    engine: str
    num_rows: int
    log_mib: float
    rounds: int
    wall_p20_s: float
    wall_p50_s: float
    wall_p80_s: float
    cpu_p50_s: float
    peak_mib: float  # the largest of all rounds, as the next
    idle_mib: float
    disk_mib: float  # files at a time, the log's not among them


@dataclass(frozen=True)
class Extrapolated:
    """The line through RecBole's two largest sizes."""

    num_rows: int
    wall_s: float
    cpu_s: float
    peak_mib: float


def main() -> None:
    parser = build_parser(__doc__, ("sizes",), rounds_help="preparations of each size by each")
    parser.add_argument("--large", action="store_true", help=f"{LARGE:,} interactions, once, alone")
    parser.set_defaults(rounds=3, device="cpu")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        parser.error("--device: this benchmark is of the CPU alone")
    if arguments.out is None and not arguments.quick:
        arguments.out = default_out("prepare_large" if arguments.large else "prepare")
    console = Console(width=max(Console().width, 140))
    header = conditions("cpu")
    found: dict[str, object] = {}
    if arguments.large:
        rows = measure_size(LARGE_QUICK if arguments.quick else LARGE, "parquet", (OURS,), 1)
        bars = large_bars(rows[0])
    else:
        sizes = SIZES_QUICK if arguments.quick else SIZES
        largest = LARGEST_OF_RECBOLE_QUICK if arguments.quick else LARGEST_OF_RECBOLE
        rows = []
        for size in sizes:
            engines = (OURS, RECBOLE) if size <= largest else (OURS,)
            rows += measure_size(size, "recbole", engines, arguments.rounds)
            console.print(f"{size:,} rows: done")
        expected = extrapolate([row for row in rows if row.engine == RECBOLE], sizes[-1])
        bars = compute_bars(rows, expected)
        found["recbole_extrapolated"] = asdict(expected)
    print_tables(console, rows, bars)
    if arguments.out is not None:
        found |= {"bars": [asdict(bar) for bar in bars], "sizes": [asdict(row) for row in rows]}
        write_json(arguments.out, header, found)


def measure_size(num_rows: int, format: str, engines: tuple[str, ...], rounds: int) -> list[Row]:
    """Of one log, by each engine, in turns."""
    measured: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # RecBole wants a file in a folder of its name.
        log = folder / "log" / ("log.parquet" if format == "parquet" else "log.inter")
        log_bytes = (write_parquet if format == "parquet" else write_inter)(log, num_rows)
        run = {
            OURS: partial(run_ours, log, format, folder / "run"),
            RECBOLE: partial(run_recbole, log, folder / "run"),
        }
        for turn in range(rounds):
            for engine in rotated(engines, turn):
                measured[engine].append(run[engine]())
    return [
        Row(
            engine,
            num_rows,
            round(log_bytes / MIB, 1),
            len(some),
            *quantiles([one["wall_s"] for one in some]),
            quantiles([one["cpu_s"] for one in some])[1],
            *(max(one[name] for one in some) for name in ("peak_mib", "idle_mib", "disk_mib")),
        )
        for engine, some in measured.items()
    ]


def run_ours(log: Path, format: str, run_dir: Path) -> dict[str, float]:
    program = ROOT / "benchmarks/prepare_run.py"
    command = [sys.executable, str(program), str(log), format, str(run_dir / "prepared")]
    return run_program(command, run_dir)


def run_recbole(log: Path, run_dir: Path) -> dict[str, float]:
    program = ROOT / "benchmarks/peers/recbole_prepare.py"
    command = [str(python_of("recbole")), str(program), str(log)]
    return run_program(command, run_dir, PYTHONPATH=str(ROOT / "benchmarks"))


def run_program(command: list[str], run_dir: Path, **environment: str) -> dict[str, float]:
    """What a program prints last, and `disk_mib`; RuntimeError with its last words if it fails.

    Args:
        run_dir: made for it to work in, and to write into; it goes away.
    """
    run_dir.mkdir()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run_dir,
        env=os.environ | environment,
    )
    most_bytes = 0
    while process.poll() is None:
        most_bytes = max(most_bytes, _bytes_in(run_dir))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    output, errors = process.communicate()
    shutil.rmtree(run_dir)
    if process.returncode != 0:
        raise RuntimeError((errors.strip().splitlines() or [f"exit {process.returncode}"])[-1])
    return {**json.loads(output.splitlines()[-1]), "disk_mib": round(most_bytes / MIB, 1)}


def _bytes_in(folder: Path) -> int:
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # files come and go meanwhile
                found += os.path.getsize(os.path.join(parent, name))
    return found


def extrapolate(rows: list[Row], num_rows: int) -> Extrapolated:
    """Args:
    rows: RecBole's.
    """
    low, high = sorted(rows, key=lambda row: row.num_rows)[-2:]
    beyond = (num_rows - high.num_rows) / (high.num_rows - low.num_rows)

    def line(at_low: float, at_high: float) -> float:
        return round(at_high + beyond * (at_high - at_low), 1)

    return Extrapolated(
        num_rows,
        line(low.wall_p50_s, high.wall_p50_s),
        line(low.cpu_p50_s, high.cpu_p50_s),
        line(low.peak_mib, high.peak_mib),
    )


def compute_bars(rows: list[Row], expected: Extrapolated) -> list[Bar]:
    ours = {row.num_rows: row for row in rows if row.engine == OURS}
    at_end = ours[expected.num_rows]
    where = f"{expected.num_rows} rows, RecBole's extrapolated"
    both = [(ours[row.num_rows], row) for row in rows if row.engine == RECBOLE]
    times = [(a.wall_p50_s / b.wall_p50_s, f"{b.num_rows} rows") for a, b in both]
    peaks = [(a.peak_mib / b.peak_mib, f"{b.num_rows} rows") for a, b in both]
    return [
        at_most("wall time over RecBole's", 0.2, [(at_end.wall_p50_s / expected.wall_s, where)]),
        at_most("peak memory over RecBole's", 0.2, [(at_end.peak_mib / expected.peak_mib, where)]),
        without_bound("CPU time over RecBole's", [(at_end.cpu_p50_s / expected.cpu_s, where)]),
        without_bound("wall time over RecBole's, measured", times[-1:]),
        without_bound("peak memory over RecBole's, measured", peaks[-1:]),
    ]


def large_bars(row: Row) -> list[Bar]:
    where = f"{row.num_rows} rows"
    return [
        at_most("seconds", 600, [(row.wall_p50_s, where)]),
        at_most("GiB of memory", 12, [(row.peak_mib / 1024, where)]),
        without_bound("GiB of files at a time", [(row.disk_mib / 1024, where)]),
    ]


def print_tables(console: Console, rows: list[Row], bars: list[Bar]) -> None:
    table = build_table(
        "preparation",
        *("rows", "engine", "wall s", "p20–p80", "CPU s", "peak MiB", "idle MiB", "disk MiB"),
        text_columns=("engine",),
    )
    for row in rows:
        table.add_row(
            f"{row.num_rows:,}",
            row.engine,
            f"{row.wall_p50_s:.1f}",
            f"{row.wall_p20_s:.1f}–{row.wall_p80_s:.1f}",
            f"{row.cpu_p50_s:.1f}",
            f"{row.peak_mib:,.0f}",
            f"{row.idle_mib:,.0f}",
            f"{row.disk_mib:,.0f}",
        )
    console.print(table)
    console.print(bar_table(bars))


if __name__ == "__main__":
    main()
