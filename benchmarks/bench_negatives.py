"""NegativeSampler against torch.multinomial, torch.randint and numpy, in ns a draw.

    python benchmarks/bench_negatives.py [--threads 1] [--rounds 5] [--quick]

- Every round runs each contestant once, starting with another one each time, after one call of
  each. The fast ones have three times as many rounds; every row says how many.
- Times are CPU time per thread, so run it on an idle machine; of a contestant that uses one
  thread whatever torch is set to, CPU time. On CUDA, of events around the call.
- Popularity is Zipf's, with ids in random order; `unigram` is counts^0.75. `log_uniform` has no
  counts: its popular items are the first ones.
- "ours, excluding" leaves out 50 items a row, drawn from the same distribution; nobody else
  excludes anything, or gives log_q. "multinomial per row" draws for 8 rows, since it visits every
  item for each: its ns a draw are those of any number of rows.
- "shared" draws one set of items for all rows; its contestants but "ours" give distinct ones.

Writes benchmarks/results/negatives.json and .png; a part of the benchmark only where --out says.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from conditions import build_parser, conditions, default_out, write_json
from measuring import quantiles, take_turns
from negatives_bars import Row, compute_bars
from negatives_report import print_tables, save_plot
from negatives_samplers import SAMPLERS, Sampling, Size, build_problem
from rich.console import Console

FAST = ("ours", "ours, excluding", "ours, unique", "randint", "closed form", "numpy integers")


@dataclass(frozen=True)
class Plan:
    sizes: dict[str, list[Size]]
    num_items_of_bars: int


def full_plan() -> Plan:
    size = Size(num_items=1_000_000, num_rows=4096, num_negatives=256)
    sizes = {
        "unigram": [Size(n, 4096, 256) for n in (10_000, 100_000, 1_000_000, 10_000_000)],
        "log_uniform": [size],
        "uniform": [size],
        "shared": [Size(1_000_000, 4096, 8192)],
    }
    return Plan(sizes, size.num_items)


def quick_plan() -> Plan:
    """Runs all the code in seconds; its figures mean little."""
    size = Size(num_items=10_000, num_rows=64, num_negatives=16)
    sizes = {section: [size] for section in SAMPLERS}
    return Plan(sizes | {"unigram": [Size(1000, 64, 16), size]}, size.num_items)


def measure(section: str, size: Size, rounds: int, device: str) -> list[Row]:
    distribution = "unigram" if section == "shared" else section
    problem = build_problem(distribution, size, device)
    samplings = {
        what: build(problem)
        for what, build in SAMPLERS[section].items()
        if device == "cpu" or not what.startswith(("numpy", "np."))
    }
    for sampling in samplings.values():
        sampling.draw()
    times = take_turns(
        {what: sampling.draw for what, sampling in samplings.items()},
        {what: 3 * rounds if what in FAST else rounds for what in samplings},
        device,
    )
    return [
        _row(section, size, what, sampling, times[what], device)
        for what, sampling in samplings.items()
    ]


def _row(
    section: str, size: Size, what: str, sampling: Sampling, times_ms: list[float], device: str
) -> Row:
    num_threads = torch.get_num_threads() if sampling.is_serial and device == "cpu" else 1
    scale = 1e6 * num_threads / sampling.num_draws
    p20, p50, p80 = quantiles([time_ms * scale for time_ms in times_ms])
    return Row(
        section=section,
        num_items=size.num_items,
        num_rows=size.num_rows,
        num_negatives=size.num_negatives,
        what=what,
        num_draws=sampling.num_draws,
        rounds=len(times_ms),
        p20_ns=p20,
        p50_ns=p50,
        p80_ns=p80,
        draws_per_s=round(1e9 / p50),
    )


def main() -> None:
    parser = build_parser(__doc__, tuple(SAMPLERS), rounds_help="3 x as many of the fast ones")
    arguments = parser.parse_args()
    if arguments.out is None and not (arguments.quick or arguments.only):
        arguments.out = default_out("negatives")
    torch.set_num_threads(arguments.threads)
    plan = quick_plan() if arguments.quick else full_plan()
    console = Console(width=max(Console().width, 120))
    header = conditions(arguments.device)
    rows = []
    for section, sizes in plan.sizes.items():
        if arguments.only in (None, section):
            for size in sizes:
                start = time.monotonic()
                rows.extend(measure(section, size, arguments.rounds, arguments.device))
                took_s = time.monotonic() - start
                console.print(f"{section}, {size.num_items} items: {took_s:.0f} s")

    bars = compute_bars(rows, plan.num_items_of_bars)
    print_tables(console, rows, bars)
    if arguments.out is None:
        return
    found = {"bars": [asdict(bar) for bar in bars], "rows": [asdict(row) for row in rows]}
    write_json(arguments.out, header, found)
    title = f"negatives on {header['machine']}, {header['threads']} thread(s)"
    save_plot(arguments.out.with_suffix(".png"), rows, title)


if __name__ == "__main__":
    main()
