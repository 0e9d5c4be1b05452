"""Memory and time of steps on tables of several sizes, each in a process of its own.

Run as a program this file is one of them. Peak memory is the largest resident size (VmHWM) from the
start of the process to the end of the first steps, so everything counts: Python, the libraries,
what building the table took. Only then the bare table is made. All processes live at once, and each
round has one step and one bare gather and scatter of every size: what else the machine does meets
all sizes alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from contestants import Contestant, take_turns_asked
from measuring import quantiles, take_turns
from scale_training import LOADS, BareTable, Load, Training, small
from turn_costs import MIB, status_bytes

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


def measure_sizes(load: str, sizes: Sequence[int], rounds: int, is_quick: bool) -> list[SizeRow]:
    """Rows of these numbers of items; all their tables are held at once, twice."""
    threads = torch.get_num_threads()
    contestants: list[Contestant] = []
    try:
        ready = []
        for num_items in sizes:
            arguments = (load, num_items, int(is_quick), threads)
            contestants.append(Contestant(__file__, *arguments, OMP_NUM_THREADS=threads))
            ready.append(contestants[-1].answer())
        turns = [[of_one.ask("turn") for of_one in contestants] for _ in range(rounds + 1)][1:]
    finally:
        for contestant in contestants:
            contestant.close()
        for contestant in contestants:
            contestant.wait()
    return [_row(fields, [turn[index] for turn in turns]) for index, fields in enumerate(ready)]


def _row(ready: dict[str, Any], turns: list[dict[str, float]]) -> SizeRow:
    times = {
        f"{what}_p{q}_ms": value
        for what in ("step", "bare")
        for q, value in zip(
            (20, 50, 80), quantiles([turn[f"{what}_ms"] for turn in turns]), strict=True
        )
    }
    per_s = round(ready["batch_size"] / times["step_p50_ms"] * 1000)
    num_rows = round(quantiles([turn["num_rows"] for turn in turns])[1])
    return SizeRow(**ready, **times, samples_per_s=per_s, num_rows=num_rows, rounds=len(turns))


# --- one size -----------------------------------------------------------------------------------


def main() -> None:
    name, *numbers = sys.argv[1:]
    num_items, is_quick, threads = map(int, numbers)
    torch.set_num_threads(threads)
    with joined_ranks() as ranks:
        load = small(LOADS[name]) if is_quick else LOADS[name]
        training = Training(num_items, load, ranks)
        for step in range(WARM_UP_STEPS):
            training.step(training.rows(step))
        ready = {"load": name} | _set_up(training, load, status_bytes("VmHWM"))
        take_turns_asked(ready, Turns(training))


def _set_up(training: Training, load: Load, peak_bytes: int) -> dict[str, Any]:
    return {
        "num_items": training.num_items,
        "batch_size": load.batch_size,
        "num_lookups": load.num_lookups,
        "table_mib": training.table_bytes / MIB,
        "state_mib": training.state_bytes / MIB,
        "peak_mib": peak_bytes / MIB,
        "shard_s": round(training.shard_s, 2),
        "fill_s": round(training.fill_s, 2),
    }


class Turns:
    """CPU milliseconds of a step and of a bare gather and scatter of the same rows."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.bare = BareTable(training.num_items)
        self.num_done = WARM_UP_STEPS

    def __call__(self, word: str) -> dict[str, float]:
        rows = self.training.rows(self.num_done)
        ids = self.training.draw(rows).ids.values()
        self.num_done += 1
        times = take_turns(
            {
                "step": lambda: self.training.step(rows),
                "bare": lambda: self.bare.gather_and_scatter(ids),
            },
            {"step": 1, "bare": 1},
            "cpu",
        )
        return {
            "step_ms": times["step"][0],
            "bare_ms": times["bare"][0],
            "num_rows": len(ids),
        }


if __name__ == "__main__":
    main()
