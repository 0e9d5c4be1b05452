"""The server under load: /recommend for known users at 1, 8 and 64 clients, on one replica.

    python benchmarks/bench_serve.py [--run runs/demo] [--seconds 10] [--rounds 3] [--quick]

The server is `python -m cluster.serve RUN --local`, the clients are a process of their own, all on
this machine, so they share its cores. The numbers of clients take turns. What the model itself
takes for one user, and a user's share of a call for 64, are measured in this process beside it:
the rest is HTTP, Ray Serve and JSON.

Writes benchmarks/results/serve.json; of --quick only where --out says.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from bars import at_most, bar_table, without_bound
from conditions import ROOT, build_parser, conditions, default_out, write_json
from measuring import rotated
from rich.console import Console
from serve_load import Measured, measure_load
from tables import build_table

from torchrec_pt.recommender import Recommender

NUM_CLIENTS = (1, 8, 64)
WARM_UP_S = 2.0


@dataclass(frozen=True)
class Row:
    """The medians of the rounds; `answered` and `failed` are their sums."""

    num_clients: int
    rounds: int
    per_second: float
    p50_ms: float
    p99_ms: float
    answered: int
    failed: int


def main() -> None:
    parser = build_parser(__doc__, ("load",), rounds_help="turns of each number of clients")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/demo", help="a finished run")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.set_defaults(rounds=3, device="cpu")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        parser.error("--device: this benchmark is of the CPU alone")
    if not (arguments.run / "config.json").exists():
        parser.error(f"--run: {arguments.run} holds no run; `make demo` makes runs/demo")
    if arguments.out is None and not arguments.quick:
        arguments.out = default_out("serve")
    seconds, rounds = (1.0, 1) if arguments.quick else (arguments.seconds, arguments.rounds)
    console = Console(width=max(Console().width, 120))
    header = conditions("cpu")
    recommender = Recommender.load(arguments.run)
    users = recommender.dataset.users["external_id"].to_list()
    alone_ms, together_ms = measure_model(recommender, users)
    bodies = [json.dumps({"user": user, "k": 10}) for user in users]
    found: dict[int, list[Measured]] = {num: [] for num in NUM_CLIENTS}
    with served(arguments.run) as url:
        measure_load(f"{url}/recommend", bodies, max(NUM_CLIENTS), WARM_UP_S)
        for turn in range(rounds):
            for num in rotated(NUM_CLIENTS, turn):
                found[num].append(measure_load(f"{url}/recommend", bodies, num, seconds))
                console.print(f"{num} clients: {found[num][-1].per_second:.0f} a second")
    rows = [_row(num, some) for num, some in found.items()]
    bars = [
        at_most(
            "answers that are not 200",
            0,
            [(float(row.failed), f"{row.num_clients} clients") for row in rows],
        ),
        without_bound(
            "requests a second, the fewest",
            [(row.per_second, f"{row.num_clients} clients") for row in rows],
        ),
    ]
    table = build_table("/recommend", "clients", "a second", "p50 ms", "p99 ms", text_columns=())
    for row in rows:
        table.add_row(
            str(row.num_clients), f"{row.per_second:.0f}", f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}"
        )
    console.print(table)
    console.print(f"the model: {alone_ms} ms for one user, {together_ms} ms a user for 64")
    console.print(bar_table(bars))
    if arguments.out is not None:
        result = {
            "run": str(arguments.run.name),
            "num_items": recommender.dataset.num_items,
            "seconds": seconds,
            "model_alone_ms": alone_ms,
            "model_of_64_ms_a_user": together_ms,
            "bars": [asdict(bar) for bar in bars],
            "loads": [asdict(row) for row in rows],
        }
        write_json(arguments.out, header, result)


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of a server of the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cluster.serve", str(run), "--local", "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith("serving "):
            raise RuntimeError("the server did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def measure_model(
    recommender: Recommender, users: Sequence[str | int], calls: int = 50
) -> tuple[float, float]:
    """Median ms of `recommend` for one user, and of `recommend_many` for 64, a user."""

    def median_ms(num: int) -> float:
        times = []
        for begin in range(calls):
            some = [users[(begin + place) % len(users)] for place in range(num)]
            start = time.perf_counter()
            recommender.recommend_many(some)
            times.append((time.perf_counter() - start) * 1000 / num)
        return round(float(np.median(times)), 3)

    return median_ms(1), median_ms(64)


def _row(num_clients: int, found: Sequence[Measured]) -> Row:
    def median(name: str) -> float:
        return round(float(np.median([getattr(one, name) for one in found])), 2)

    return Row(
        num_clients,
        len(found),
        median("per_second"),
        median("p50_ms"),
        median("p99_ms"),
        sum(one.answered for one in found),
        sum(one.failed for one in found),
    )


if __name__ == "__main__":
    main()
