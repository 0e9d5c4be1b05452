"""sampled_softmax_loss against PyTorch: B rows, M negatives each or for all of them, dimension D.

    python benchmarks/bench_sampled_softmax.py [--threads 1] [--rounds 5] [--quick]

- A step is forward and backward, with a coalesced gradient of the table where it is sparse.
- Every round runs each contestant once, starting with another one each time; those that are not
  ours have three rounds at most; every row says how many. Before the rounds, what is compiled has
  compiled (at the first size of a section only), and the others have run a small problem.
- Times are CPU time per thread, so run it on an idle machine; on CUDA, of events around the step.
- "eager" gathers all rows, (B, 1 + M, D), by an embedding. "eager, distinct items" gathers each
  row of the table once, then from those. torch.compile cannot compile the sparse gradient; it can
  what comes after the gather.
- Errors are those at B = 256 and 10000 items, against float64 (sampled_softmax_accuracy.py).
- Memory is that of one step in a process of its own (sampled_softmax_memory.py).

Writes benchmarks/results/sampled_softmax.json and .png; a part only where --out says.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass, replace

import torch
from conditions import build_parser, conditions, default_out, write_json
from measuring import quantiles, take_turns
from rich.console import Console
from sampled_softmax_accuracy import Errors, measure_errors
from sampled_softmax_bars import MemoryRow, Results, Row, compute_bars
from sampled_softmax_losses import (
    SECTIONS,
    Contestant,
    Problem,
    Size,
    build_problem,
    section_contestants,
)
from sampled_softmax_memory import peak_memory
from sampled_softmax_report import print_tables, save_plot

SMALL_ROWS = 256  # of warming up, and where errors are measured
SMALL_ITEMS = 10_000
OTHERS_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """The first of the sizes per row is that of the bars."""

    sizes: dict[str, list[Size]]
    rounds: int
    device: str

    @property
    def bar_size(self) -> Size:
        return self.sizes["per row"][0]


def full_plan(rounds: int, device: str) -> Plan:
    bar_size = Size(num_rows=4096, num_negatives=512, dim=64, num_items=1_000_000)
    middle = replace(bar_size, num_negatives=128)
    sizes = {
        "per row": [
            bar_size,
            middle,
            replace(bar_size, num_negatives=64),
            replace(middle, dim=32),
            replace(middle, dim=128),
        ],
        "shared": [bar_size, replace(bar_size, num_negatives=8192)],
        "bfloat16": [middle],
        "dense gradient": [replace(middle, num_items=100_000)],
    }
    return Plan(sizes, rounds, device)


def quick_plan(rounds: int, device: str) -> Plan:
    """Runs all the code in a minute or two; its figures mean little."""
    size = Size(num_rows=256, num_negatives=32, dim=32, num_items=10_000)
    sizes = {section: [size] for section in SECTIONS}
    sizes["per row"] = [size, replace(size, num_negatives=16), replace(size, dim=64)]
    return Plan(sizes, rounds, device)


# --- measuring ----------------------------------------------------------------------------------


class Bench:
    """Measures sections; remembers what was skipped and why."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan = plan
        self.console = console
        self.skipped: list[str] = []

    def times(self, section: str, size: Size) -> list[Row]:
        start = time.monotonic()
        torch.compiler.reset()
        problem = build_problem(SECTIONS[section], size, self.plan.device)
        small = build_problem(SECTIONS[section], _small(size), self.plan.device)
        contestants = {
            what: contestant
            for what, contestant in section_contestants(section).items()
            if not contestant.is_compiled or size == self.plan.sizes[section][0]
        }
        errors = self._errors(section, contestants, small)  # warms up, too
        contestants = {what: contestants[what] for what in errors}
        for contestant in contestants.values():
            if contestant.is_compiled:
                contestant.gradients(problem)
        times = take_turns(
            {
                what: functools.partial(contestant.gradients, problem)
                for what, contestant in contestants.items()
            },
            {what: self._num_rounds(what) for what in contestants},
            self.plan.device,
        )
        self.console.print(f"{section}, {size}: {time.monotonic() - start:.0f} s")
        ours_ms = quantiles(times["ours"])[1]
        return [
            _row(section, size, what, values, ours_ms, errors[what])
            for what, values in times.items()
        ]

    def memory(self) -> list[MemoryRow]:
        """Of every contestant per row at the size of the bars."""
        section, size = "per row", self.plan.bar_size
        rows = []
        for what in section_contestants(section):
            try:
                peak = peak_memory(section, what, size, self.plan.device)
            except RuntimeError as error:
                self._skip(f"memory of {what}, {section}", str(error))
                continue
            rows.append(MemoryRow(section, size, what, peak.extra_mib, peak.total_mib))
        self.console.print("memory: done")
        return rows

    def _errors(
        self, section: str, contestants: dict[str, Contestant], small: Problem
    ) -> dict[str, Errors]:
        """Of those that run here."""
        found = {}
        for what, contestant in contestants.items():
            try:
                found[what] = measure_errors(contestant, small)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._skip(f"{what}, {section}", str(error).splitlines()[0])
        return found

    def _num_rounds(self, what: str) -> int:
        return self.plan.rounds if what == "ours" else min(self.plan.rounds, OTHERS_ROUNDS)

    def _skip(self, what: str, reason: str) -> None:
        self.skipped.append(f"skipped {what}: {reason}")
        self.console.print(self.skipped[-1], markup=False)


def _small(size: Size) -> Size:
    return replace(
        size,
        num_rows=min(size.num_rows, SMALL_ROWS),
        num_items=min(size.num_items, SMALL_ITEMS),
    )


def _row(
    section: str, size: Size, what: str, times_ms: list[float], ours_ms: float, errors: Errors
) -> Row:
    p20, p50, p80 = quantiles(times_ms)
    return Row(
        section=section,
        size=size,
        what=what,
        rounds=len(times_ms),
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        ratio=round(p50 / ours_ms, 3),
        loss_error=errors.loss,
        query_error=errors.query,
        table_error=errors.table,
    )


# --- the result ---------------------------------------------------------------------------------


def main() -> None:
    parser = build_parser(
        __doc__, (*SECTIONS, "memory"), rounds_help="of ours; of the others three at most"
    )
    arguments = parser.parse_args()
    if arguments.out is None and not (arguments.quick or arguments.only):
        arguments.out = default_out("sampled_softmax")
    torch.set_num_threads(arguments.threads)
    plan = (quick_plan if arguments.quick else full_plan)(arguments.rounds, arguments.device)
    console = Console(width=max(Console().width, 140))
    header = conditions(plan.device)
    bench = Bench(plan, console)
    results = Results([], [])
    for section, sizes in plan.sizes.items():
        if arguments.only in (None, section):
            for size in sizes:
                results.rows.extend(bench.times(section, size))
    if arguments.only in (None, "memory"):
        results.memory.extend(bench.memory())

    bars = compute_bars(results, plan.bar_size)
    print_tables(console, results, bars)
    if arguments.out is None:
        return
    found = {
        "errors_at": {"num_rows": SMALL_ROWS, "num_items": SMALL_ITEMS},
        "skipped": bench.skipped,
        "bars": [asdict(bar) for bar in bars],
        "rows": [asdict(row) for row in results.rows],
        "memory": [asdict(row) for row in results.memory],
    }
    write_json(arguments.out, header, found)
    title = f"sampled_softmax on {header['machine']}, {header['threads']} thread(s)"
    save_plot(arguments.out.with_suffix(".png"), results, title)


if __name__ == "__main__":
    main()
