"""infonce against PyTorch and against its bare matrix products, over N queries and keys of D.

    python benchmarks/bench_infonce.py [--threads 1] [--rounds 5] [--quick]

- Every round runs each contestant once, starting with another one each time. Before the rounds
  torch.compile has compiled, and the others have run a problem of at most 2048 rows. From
  N = 16384 on there are fewer rounds (num_rounds); every row says how many.
- Times are CPU time per thread, so run it on an idle machine; on CUDA, of events around the step.
- `ratio` is to the bare products of the same run, in row blocks of the best size: one for
  forward, three for one direction with gradients, four for symmetric.
- Errors are those at N = 2048 and the same D, against float64 (infonce_accuracy.py).
- Memory is that of one step in a process of its own (infonce_memory.py).

Writes benchmarks/results/infonce.json and .png; a part of the benchmark only where --out says.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from conditions import build_parser, conditions, default_out, write_json
from infonce_accuracy import Errors, measure_errors
from infonce_bars import BarSizes, MemoryRow, Results, Row, compute_bars
from infonce_losses import CONTESTANTS, PRODUCTS, Contestant, Problem, best_products, build_problem
from infonce_memory import peak_memory
from infonce_report import print_tables, save_plot
from measuring import elapsed_ms, quantiles, take_turns
from rich.console import Console

SECTIONS = ("one-direction", "symmetric", "forward", "memory", "scaling")
ERROR_ROWS = 2048
HUGE = 16384
SLOW = ("eager", "torch.compile", "chunked")  # twice at HUGE
Size = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """The sizes (N, D) of each section."""

    sizes: dict[str, list[Size]]
    scaling: list[Size]
    bars: BarSizes
    rounds: int
    device: str


def full_plan(rounds: int, device: str) -> Plan:
    every = [(n, d) for n in (2048, 8192, 16384) for d in (64, 128, 256)]
    sizes = {
        "one-direction": every,
        "symmetric": [(n, d) for n, d in every if d <= 128],
        "forward": [(n, d) for n, d in every if d == 128 or n == 8192],
    }
    scaling = [(n, 64) for n in (2048, 4096, 8192, 16384)] + [(4096, d) for d in (32, 128, 256)]
    return Plan(sizes, scaling, BarSizes(), rounds, device)


def quick_plan(rounds: int, device: str) -> Plan:
    """Runs all the code in a minute; its figures mean little."""
    every = [(n, d) for n in (256, 1024) for d in (32, 64)]
    scaling = [(n, 32) for n in (256, 512, 1024, 2048)] + [(512, d) for d in (64, 128, 256)]
    bars = BarSizes(products=(1024, 64), memory=(1024, 64), large=1024)
    return Plan(dict.fromkeys(SECTIONS[:3], every), scaling, bars, rounds, device)


# --- measuring ----------------------------------------------------------------------------------


def num_rounds(what: str, num_rows: int, rounds: int) -> int:
    if num_rows >= HUGE:
        return min(rounds, 2 if what in SLOW else 5)
    return rounds if num_rows > 2048 else 3 * rounds


class Bench:
    """Measures sections; remembers errors, and what was skipped and why."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan = plan
        self.console = console
        self.skipped: list[str] = []
        self._errors: dict[tuple[str, int, str], Errors] = {}

    def times(self, section: str, size: Size) -> list[Row]:
        """Of a section's contestants and of the products."""
        start = time.monotonic()
        torch.compiler.reset()
        problem = build_problem(*size, self.plan.device)
        contestants = self._ready_contestants(section, problem)
        steps = {what: _step(section, each, problem) for what, each in contestants.items()}
        clock = functools.partial(elapsed_ms, device=self.plan.device)
        products = best_products(section, problem, clock)
        steps["products"] = functools.partial(PRODUCTS[section], products)
        rounds = {what: num_rounds(what, size[0], self.plan.rounds) for what in steps}
        times = take_turns(steps, rounds, self.plan.device)
        base_ms = float(np.median(times["products"]))
        errors = {what: self._error(section, size[1], what) for what in contestants}
        self.console.print(f"{section} {size[0]}x{size[1]}: {time.monotonic() - start:.0f} s")
        return [
            _row(section, size, what, values, base_ms, errors.get(what), products.block)
            for what, values in times.items()
        ]

    def memory(self, scaling_alone: bool) -> list[MemoryRow]:
        """Of every contestant at the size of the bar, and of ours over N and D."""
        plan = self.plan
        wanted = [("scaling", "one-direction", "ours", size) for size in plan.scaling]
        wanted += [
            (direction, direction, what, plan.bars.memory)
            for direction, contestants in CONTESTANTS.items()
            for what in contestants
            if not scaling_alone
        ]
        rows = []
        for section, direction, what, size in wanted:
            try:
                peak = peak_memory(direction, what, size, plan.device)
            except RuntimeError as error:
                self._skip(f"memory of {what}", str(error))
                continue
            rows.append(MemoryRow(section, *size, what, peak.extra_mib, peak.total_mib))
        self.console.print("memory: done")
        return rows

    def _ready_contestants(self, section: str, problem: Problem) -> dict[str, Contestant]:
        """Those of the section that run here, compiled or warmed up on a small problem."""
        num_rows, dim = problem.query.shape
        small = build_problem(min(num_rows, ERROR_ROWS), dim, self.plan.device)
        ready = {}
        for what, contestant in section_contestants(section).items():
            at = problem if what == "torch.compile" else small
            try:
                _step(section, contestant, at)()
            except torch._dynamo.exc.TorchDynamoException as error:
                self._skip(what, str(error).splitlines()[0])
                continue
            ready[what] = contestant
        return ready

    def _error(self, section: str, dim: int, what: str) -> Errors:
        key = ("one-direction" if section == "scaling" else section, dim, what)
        if key not in self._errors:
            problem = build_problem(ERROR_ROWS, dim, self.plan.device)
            contestant = section_contestants(section)[what]
            self._errors[key] = measure_errors(contestant, problem, section)
        return self._errors[key]

    def _skip(self, what: str, reason: str) -> None:
        line = f"skipped {what}: {reason}"
        if line not in self.skipped:
            self.skipped.append(line)
            self.console.print(line, markup=False)


def section_contestants(section: str) -> dict[str, Contestant]:
    contestants = CONTESTANTS["symmetric" if section == "symmetric" else "one-direction"]
    if section == "scaling":
        return {"ours": contestants["ours"]}
    if section == "forward":
        return {what: each for what, each in contestants.items() if "option" not in what}
    return contestants


def _step(section: str, contestant: Contestant, problem: Problem) -> Callable[[], object]:
    run = contestant.forward if section == "forward" else contestant.gradients
    return functools.partial(run, problem)


def _row(
    section: str,
    size: Size,
    what: str,
    times: list[float],
    base_ms: float,
    errors: Errors | None,
    block: int,
) -> Row:
    p20, p50, p80 = quantiles(times)
    return Row(
        section=section,
        n=size[0],
        d=size[1],
        what=what,
        rounds=len(times),
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        ratio=round(p50 / base_ms, 3),
        loss_error=None if errors is None else errors.loss,
        gradient_error=None if errors is None else errors.gradient,
        block=block if errors is None else None,
    )


# --- the result ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = build_parser(__doc__, SECTIONS, rounds_help="3 x as many up to N = 2048")
    parser.add_argument("--sizes", type=parse_sizes, help="such as 2048x64,8192x128")
    arguments = parser.parse_args()
    if arguments.out is None and not (arguments.quick or arguments.only or arguments.sizes):
        arguments.out = default_out("infonce")
    return arguments


def parse_sizes(text: str) -> list[Size]:
    sizes = []
    for size in text.split(","):
        num_rows, dim = size.split("x")
        sizes.append((int(num_rows), int(dim)))
    return sizes


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    plan = (quick_plan if arguments.quick else full_plan)(arguments.rounds, arguments.device)
    console = Console(width=max(Console().width, 120))
    header = conditions(plan.device)
    bench = Bench(plan, console)
    results = Results([], [])
    sections = plan.sizes | {"scaling": plan.scaling}
    for section, sizes in sections.items():
        if arguments.only in (None, section):
            chosen = sizes if section == "scaling" else arguments.sizes or sizes
            for size in chosen:
                results.rows.extend(bench.times(section, size))
    if arguments.only in (None, "memory", "scaling"):
        results.memory.extend(bench.memory(scaling_alone=arguments.only == "scaling"))

    bars = compute_bars(results, plan.bars)
    print_tables(console, results, bars)
    if arguments.out is None:
        return
    found = {
        "errors_at_n": ERROR_ROWS,
        "skipped": bench.skipped,
        "bars": [asdict(bar) for bar in bars],
        "exponents": results.exponents(),
        "rows": [asdict(row) for row in results.rows],
        "memory": [asdict(row) for row in results.memory],
    }
    write_json(arguments.out, header, found)
    title = f"infonce on {header['machine']}, {header['threads']} thread(s)"
    save_plot(arguments.out.with_suffix(".png"), results, title)


if __name__ == "__main__":
    main()
