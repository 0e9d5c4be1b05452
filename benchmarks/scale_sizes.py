"""Memory and time of steps on one table, in a process of its own: a program for bench_scale.py.

Peak memory is the largest resident size (VmHWM) from the start of the process to the end of the
first steps, so everything counts: Python, the libraries, what building the table took. Only then
the bare table is made, and steps and bare gathers and scatters take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from measuring import quantiles, take_turns
from peak_memory import MIB, status_bytes
from scale_training import LOADS, BareTable, Load, Training, small

from torchrec_pt.distributed import joined_ranks

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class SizeRow:
    """Steps of one load on one table; CPU milliseconds."""

    load: str
    num_items: int
    batch_size: int
    num_lookups: int
    num_rows: int  # distinct ones of a step
    rounds: int
    step_p20_ms: float
    step_p50_ms: float
    step_p80_ms: float
    bare_p20_ms: float
    bare_p50_ms: float
    bare_p80_ms: float
    samples_per_s: float
    table_mib: float
    state_mib: float
    peak_mib: float
    shard_s: float
    fill_s: float

    @property
    def rest_ms(self) -> float:
        """What a step takes beyond a bare gather and scatter of its rows."""
        return self.step_p50_ms - self.bare_p50_ms

    @property
    def rest_mib(self) -> float:
        return self.peak_mib - self.table_mib - self.state_mib


def measure_size(load: str, num_items: int, rounds: int, is_quick: bool) -> SizeRow:
    """Run this file as a program; RuntimeError with its last words if it fails."""
    threads = torch.get_num_threads()
    command = [sys.executable, __file__, load, num_items, rounds, int(is_quick), threads]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(words[-1])
    return SizeRow(**json.loads(done.stdout.splitlines()[-1]))


def _measure(name: str, load: Load, num_items: int, rounds: int) -> SizeRow:
    with joined_ranks() as ranks:
        training = Training(num_items, load, ranks)
        for step in range(WARM_UP_STEPS):
            training.step(training.rows(step))
        peak_bytes = status_bytes("VmHWM")
        times, num_rows = _take_turns(training, rounds)
    step_ms, bare_ms = times["step"], times["bare"]
    fields: dict[str, Any] = {
        f"{what}_p{q}_ms": value
        for what, values in (("step", step_ms), ("bare", bare_ms))
        for q, value in zip((20, 50, 80), quantiles(values), strict=True)
    }
    return SizeRow(
        load=name,
        num_items=num_items,
        batch_size=load.batch_size,
        num_lookups=load.num_lookups,
        num_rows=num_rows,
        rounds=rounds,
        samples_per_s=round(load.batch_size / quantiles(step_ms)[1] * 1000),
        table_mib=training.table_bytes / MIB,
        state_mib=training.state_bytes / MIB,
        peak_mib=peak_bytes / MIB,
        shard_s=round(training.shard_s, 2),
        fill_s=round(training.fill_s, 2),
        **fields,
    )


def _take_turns(training: Training, rounds: int) -> tuple[dict[str, list[float]], int]:
    """CPU milliseconds of "step" and "bare", and how many rows a step reads and updates."""
    bare = BareTable(training.num_items)
    batches = [training.rows(WARM_UP_STEPS + index) for index in range(rounds + 1)]
    ids = [training.draw(rows).ids.values() for rows in batches]
    bare.gather_and_scatter(ids.pop())
    num_rows = int(torch.tensor([len(of_step) for of_step in ids]).median())
    training.step(batches.pop())
    steps, bares = iter(batches), iter(ids)
    times = take_turns(
        {
            "step": lambda: training.step(next(steps)),
            "bare": lambda: bare.gather_and_scatter(next(bares)),
        },
        {"step": rounds, "bare": rounds},
        "cpu",
    )
    return times, num_rows


def main() -> None:
    name, *numbers = sys.argv[1:]
    num_items, rounds, is_quick, threads = map(int, numbers)
    torch.set_num_threads(threads)
    load = small(LOADS[name]) if is_quick else LOADS[name]
    print(json.dumps(asdict(_measure(name, load, num_items, rounds))))


if __name__ == "__main__":
    main()
