"""Preparation by Ray Data against the local engine, on logs of 1, 3 and 10 million interactions.

    python benchmarks/bench_ingest.py [--rounds 3] [--quick]

Both on this machine, in turns, each in processes of its own; the datasets must be the same bytes.
On one machine Ray Data can only lose: of long logs the local engine, too, writes and reads every
row several times so that no process holds them all, and none of it goes through other processes.
What Ray Data buys is machines that one could add.

Writes benchmarks/results/ingest.json; of --quick only where --out says.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bars import at_most, bar_table, without_bound
from conditions import ROOT, build_parser, conditions, default_out, write_json
from ingest_engines import PROGRAMS, Measured, measure
from ingest_log import write_log
from measuring import quantiles, rotated
from rich.console import Console
from tables import build_table

SIZES = (1_000_000, 3_000_000, 10_000_000)
NUM_FILES = 8
CONFIG = """\
run_dir = "{run_dir}"
[data]
format = "csv"
path = "{log}"
columns = {{ rating = "rating", timestamp = "timestamp" }}
filters = {{ user_core = 5, item_core = 5 }}
"""


@dataclass(frozen=True)
class Row:
    num_rows: int
    log_mib: float
    engine: str
    rounds: int
    prepare_p20_s: float
    prepare_p50_s: float
    prepare_p80_s: float
    wall_p50_s: float
    driver_mib: float  # the largest of all rounds, as the next
    task_mib: float
    is_same: bool  # as the local engine's, byte for byte


def main() -> None:
    parser = build_parser(
        __doc__,
        ("sizes",),
        rounds_help="preparations by each engine; a third as many of the largest log",
    )
    parser.set_defaults(rounds=3, device="cpu")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        parser.error("--device: this benchmark is of the CPU alone")
    if arguments.out is None and not arguments.quick:
        arguments.out = default_out("ingest")
    sizes = (100_000,) if arguments.quick else SIZES
    console = Console(width=max(Console().width, 150))
    header = conditions("cpu")
    rows = []
    for size in sizes:
        is_largest = size == max(SIZES)
        rounds = max(1, arguments.rounds // 3) if is_largest else arguments.rounds
        rows += measure_size(size, rounds, console)
    ratios = [(ratio, f"{num_rows} rows") for num_rows, ratio in compute_ratios(rows).items()]
    same = [(float(not row.is_same), f"{row.num_rows} rows") for row in rows]
    bars = [
        at_most("datasets of other bytes than the local engine's", 0, same),
        without_bound("Ray Data's time over the local engine's, the least", ratios),
        without_bound("the same, the most", [max(ratios)]),
    ]
    table = build_table(
        "preparation",
        *("rows", "engine", "prepare s", "p20–p80", "with start s", "driver MiB", "task MiB"),
        text_columns=("engine",),
    )
    for row in rows:
        table.add_row(
            f"{row.num_rows:,}",
            row.engine,
            f"{row.prepare_p50_s:.1f}",
            f"{row.prepare_p20_s:.1f}–{row.prepare_p80_s:.1f}",
            f"{row.wall_p50_s:.1f}",
            f"{row.driver_mib:.0f}",
            f"{row.task_mib:.0f}",
        )
    console.print(table)
    console.print(bar_table(bars))
    if arguments.out is not None:
        found = {
            "num_files": NUM_FILES,
            "bars": [asdict(bar) for bar in bars],
            "ratios": compute_ratios(rows),
            "sizes": [asdict(row) for row in rows],
        }
        write_json(arguments.out, header, found)


def measure_size(num_rows: int, rounds: int, console: Console) -> list[Row]:
    found: dict[str, list[Measured]] = {engine: [] for engine in PROGRAMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log_bytes = write_log(folder / "log", num_rows, NUM_FILES)
        for turn in range(rounds):
            for engine in rotated(list(PROGRAMS), turn):
                run_dir, config = folder / engine, folder / f"{engine}.toml"
                shutil.rmtree(run_dir, ignore_errors=True)
                config.write_text(CONFIG.format(run_dir=run_dir, log=folder / "log"))
                measured = measure(engine, config, ROOT)
                found[engine].append(measured)
                console.print(f"{num_rows:,} rows, {engine}: {measured.prepare_s:.1f} s")
        expected = _content(folder / "local/prepared")
        is_same = {
            engine: _content(folder / engine / "prepared") == expected for engine in PROGRAMS
        }
    return [
        _row(num_rows, log_bytes, engine, some, is_same[engine]) for engine, some in found.items()
    ]


def _row(num_rows: int, log_bytes: int, engine: str, found: list[Measured], is_same: bool) -> Row:
    return Row(
        num_rows,
        round(log_bytes / 2**20, 1),
        engine,
        len(found),
        *quantiles([one.prepare_s for one in found]),
        quantiles([one.wall_s for one in found])[1],
        max(one.driver_mib for one in found),
        max(one.task_mib for one in found),
        is_same,
    )


def compute_ratios(rows: list[Row]) -> dict[int, float]:
    """Rows of the log -> the median time of Ray Data over that of the local engine."""
    times = {(row.num_rows, row.engine): row.prepare_p50_s for row in rows}
    return {
        num_rows: round(time / times[num_rows, "local"], 2)
        for (num_rows, engine), time in times.items()
        if engine == "ray"
    }


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


if __name__ == "__main__":
    main()
