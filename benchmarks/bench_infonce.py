"""infonce against PyTorch: forward and backward of one-directional InfoNCE over N x N logits.

    python benchmarks/bench_infonce.py [--threads 1] [--rounds 9]

The contestants take turns within a round; times are CPU time per thread, so run it on an idle
machine. `ratio` is to the four bare products of 2 N² D operations (q·kᵀ twice, one for each
gradient). Those write all N x N logits to memory, so a loss in tiles can be below 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchrec_pt.ops import build_info, infonce_loss

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(2048, 128), (8192, 64), (8192, 128)]
TEMPERATURE = 0.1


def eager(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    logits = query @ keys.T / TEMPERATURE
    return (logits.logsumexp(1) - logits.gather(1, target[:, None]).squeeze(1)).mean()


def cross_entropy(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(query @ keys.T / TEMPERATURE, target)


def linear_cross_entropy(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(query / TEMPERATURE, keys, target, options=options)


def ours(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    return infonce_loss(query, keys, target, temperature=TEMPERATURE)


@torch.no_grad()
def four_products(query: Tensor, keys: Tensor) -> None:
    logits = query @ keys.T
    torch.mm(query, keys.T, out=logits)
    logits @ keys
    logits.T @ query


LOSSES = [ours, linear_cross_entropy, cross_entropy, eager]


def measure(num_rows: int, dim: int, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds per thread of each contestant, sorted."""
    query, keys = (F.normalize(torch.randn(num_rows, dim)).requires_grad_() for _ in range(2))
    target = torch.arange(num_rows)
    contestants: dict[str, Callable[[], object]]
    contestants = {"four_products": lambda: four_products(query, keys)}
    for loss in LOSSES:
        contestants[loss.__name__] = lambda loss=loss: torch.autograd.grad(
            loss(query, keys, target), (query, keys)
        )
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_index in range(rounds + 1):
        for name, step in contestants.items():
            start = time.process_time()
            step()
            if round_index > 0:  # the first round warms up
                elapsed_ms = (time.process_time() - start) * 1000
                times[name].append(elapsed_ms / torch.get_num_threads())
    return {name: sorted(values) for name, values in times.items()}


def quantile(ordered: list[float], share: float) -> float:
    return round(ordered[round(share * (len(ordered) - 1))], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    table = Table("N", "D", "what", "p20 ms", "p50 ms", "p80 ms", "ratio")
    rows = []
    for num_rows, dim in SIZES:
        times = measure(num_rows, dim, arguments.rounds)
        for name, ordered in times.items():
            p20, p50, p80 = (quantile(ordered, share) for share in (0.2, 0.5, 0.8))
            ratio = round(p50 / quantile(times["four_products"], 0.5), 2)
            row = {"n": num_rows, "d": dim, "what": name, "p20_ms": p20, "p50_ms": p50}
            rows.append(row | {"p80_ms": p80, "ratio": ratio})
            table.add_row(*map(str, rows[-1].values()))
    Console().print(table)

    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "build": build_info(),
        "rows": rows,
    }
    (ROOT / "benchmarks/results/infonce.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
