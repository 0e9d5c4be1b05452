"""Training over item tables of 10⁴ to 3·10⁷ rows × 32, and by two processes against one.

    python benchmarks/bench_scale.py [--threads 1] [--rounds 15] [--quick] [--only sizes|ranks]

- What is trained stands in scale_training.py: the library's sharded learner on uniform items, under
  two loads. "lookups" reads and updates 43,000 rows for 2,560 predictions, "arithmetic" 14,000 for
  12,800. CPU alone.
- sizes: "lookups", where the table weighs most; each table in a process of its own, in turns.
  Beside each step a bare gather and scatter of the same rows of a plain tensor of that size; CPU
  time per thread.
- ranks: one process on one core and two on two train the same global batches in turns; wall time,
  beside it the share of the cores that other processes took (scale_ranks.py says how). Run it on
  an idle machine.

The tables need 13 GB. Writes benchmarks/results/scale.json and .png; a part of the
benchmark only where --out says.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass

import torch
from conditions import build_parser, conditions, default_out, write_json
from rich.console import Console
from scale_bars import compute_bars
from scale_ranks import RanksRow, measure_ranks
from scale_report import print_tables, save_plot
from scale_sizes import SizeRow, measure_sizes
from scale_training import DIM, LOADS

SECTIONS = ("sizes", "ranks")


@dataclass(frozen=True)
class Plan:
    sizes: tuple[int, ...]  # items
    ranks: tuple[int, ...]
    rounds: int
    steps: int  # of a turn of ranks
    is_quick: bool


def main() -> None:
    parser = build_parser(__doc__, SECTIONS, rounds_help="steps; a third as many turns of ranks")
    parser.set_defaults(rounds=15, device="cpu")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        parser.error("--device: this benchmark is of the CPU alone")
    if arguments.out is None and not (arguments.quick or arguments.only):
        arguments.out = default_out("scale")
    torch.set_num_threads(arguments.threads)
    plan = Plan(
        sizes=(10_000, 100_000, 1_000_000, 10_000_000, 30_000_000),
        ranks=(100_000, 1_000_000, 3_000_000),
        rounds=arguments.rounds,
        steps=4,
        is_quick=False,
    )
    if arguments.quick:
        plan = Plan((10_000, 1_000_000), (10_000,), rounds=3, steps=3, is_quick=True)
    console = Console(width=max(Console().width, 150))
    header = conditions(arguments.device)
    sizes: list[SizeRow] = []
    ranks: list[RanksRow] = []
    if arguments.only in (None, "sizes"):
        start = time.monotonic()
        sizes = measure_sizes("lookups", plan.sizes, plan.rounds, plan.is_quick)
        _say(console, "sizes", start)
    if arguments.only in (None, "ranks"):
        for load, num_items in itertools.product(LOADS, plan.ranks):
            start = time.monotonic()
            ranks.append(_ranks(load, num_items, plan))
            _say(console, f"ranks, {load}, {num_items} items", start)

    bars = compute_bars(sizes, ranks)
    print_tables(console, sizes, ranks, bars)
    if arguments.out is None:
        return
    found = {
        "dim": DIM,
        "loads": {name: asdict(load) for name, load in LOADS.items()},
        "bars": [asdict(bar) for bar in bars],
        "sizes": [asdict(row) | _rests(row) for row in sizes],
        "ranks": [asdict(row) for row in ranks],
    }
    write_json(arguments.out, header, found)
    title = f"scale on {header['machine']}, {header['threads']} thread(s)"
    save_plot(arguments.out.with_suffix(".png"), sizes, ranks, title)


def _ranks(load: str, num_items: int, plan: Plan) -> RanksRow:
    rounds = max(1, plan.rounds // 3)
    return measure_ranks(load, num_items, rounds=rounds, steps=plan.steps, is_quick=plan.is_quick)


def _rests(row: SizeRow) -> dict[str, float]:
    return {"rest_ms": row.rest_ms, "rest_mib": row.rest_mib}


def _say(console: Console, what: str, start: float) -> None:
    console.print(f"{what}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
