"""One process on one core and two on two train the same global batches in turns.

Run as a program this file is one rank, asked for so many steps at a time. Every rank is held to a
core of its own. Both groups live at once, and one sleeps
while the other has its turn.

- Wall time is that of the slower rank, from a barrier to the end of the turn.
- Communication: the part of the wall time in which a collective was under way, by torch.profiler's
  gloo events, in a turn of its own. It holds the wait for the slower rank and what overlaps with
  arithmetic.
- Other processes' share of the cores during a turn: what /proc/stat counts as busy or stolen, less
  the CPU time of the ranks. Pairs of turns in which it was above `QUIET` are not used, if
  `FEWEST_PAIRS` remain. Otherwise all are, and the row says that the machine was busy: its wall
  times then tell more of the others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from contestants import Contestant, take_turns_asked
from measuring import quantiles
from scale_training import LOADS, Training, small
from torch.profiler import ProfilerActivity, profile

from torchrec_pt.distributed import joined_ranks

QUIET = 0.1  # of all cores
FEWEST_PAIRS = 3
PROFILED_STEPS = 10
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class RanksRow:
    """One process on one core against two on two; wall milliseconds of a step."""

    load: str
    num_items: int
    batch_size: int  # over all ranks
    num_lookups: int
    rounds: int
    rounds_used: int
    is_quiet: bool
    others_share: float  # of the cores, in the turns used
    one_p20_ms: float
    one_p50_ms: float
    one_p80_ms: float
    two_p20_ms: float
    two_p50_ms: float
    two_p80_ms: float
    ratio: float  # of the medians: one / two
    one_cpu_ms: float
    two_cpu_ms: float  # of the busier rank
    communication_share: float  # of a step's wall time
    communication_ms: dict[str, float]  # by collective, of a step
    collectives: dict[str, float]  # how many of each in a step


@dataclass(frozen=True)
class Turn:
    wall_ms: float  # of a step
    cpu_ms: float  # of a step on the busier rank
    others_share: float


def measure_ranks(
    load: str, num_items: int, *, rounds: int, steps: int, is_quick: bool
) -> RanksRow:
    """Take turns until `rounds` pairs of them were quiet, but no more than twice as many."""
    turns: list[tuple[Turn, Turn]] = []
    with _group(1, load, num_items, is_quick) as one, _group(2, load, num_items, is_quick) as two:
        quiet: list[tuple[Turn, Turn]] = []
        while len(quiet) < rounds and len(turns) < 2 * rounds:
            turns.append((one.turn(steps), two.turn(steps)))
            quiet = [pair for pair in turns if max(t.others_share for t in pair) <= QUIET]
        communication = two.communication()
    is_quiet = len(quiet) >= FEWEST_PAIRS
    used = quiet if is_quiet else turns
    ones, twos = ([pair[index] for pair in used] for index in (0, 1))
    of_one, of_two = (quantiles([turn.wall_ms for turn in group]) for group in (ones, twos))
    the_load = small(LOADS[load]) if is_quick else LOADS[load]
    return RanksRow(
        load=load,
        num_items=num_items,
        batch_size=the_load.batch_size,
        num_lookups=the_load.num_lookups,
        rounds=len(turns),
        rounds_used=len(used),
        is_quiet=is_quiet,
        others_share=round(float(np.median([t.others_share for t in ones + twos])), 3),
        one_p20_ms=of_one[0],
        one_p50_ms=of_one[1],
        one_p80_ms=of_one[2],
        two_p20_ms=of_two[0],
        two_p50_ms=of_two[1],
        two_p80_ms=of_two[2],
        ratio=round(of_one[1] / of_two[1], 3),
        one_cpu_ms=quantiles([turn.cpu_ms for turn in ones])[1],
        two_cpu_ms=quantiles([turn.cpu_ms for turn in twos])[1],
        **communication,
    )


class _Group:
    """The ranks of one world, each a process that waits for its turn."""

    def __init__(self, ranks: list[Contestant]) -> None:
        self.ranks = ranks

    def turn(self, steps: int) -> Turn:
        before, start = _busy_s(), time.monotonic()
        answers = self._ask(str(steps))
        busy_s, took_s = _busy_s() - before, time.monotonic() - start
        ours_s = sum(answer["cpu_s"] for answer in answers)
        num_cores = os.cpu_count() or 1
        return Turn(
            wall_ms=max(answer["wall_s"] for answer in answers) * 1000 / steps,
            cpu_ms=max(answer["cpu_s"] for answer in answers) * 1000 / steps,
            others_share=max(0.0, busy_s - ours_s) / (took_s * num_cores),
        )

    def communication(self) -> dict[str, Any]:
        return self._ask("profile")[0]

    def _ask(self, word: str) -> list[dict[str, Any]]:
        for rank in self.ranks:
            rank.send(word)
        return [rank.answer() for rank in self.ranks]


@contextlib.contextmanager
def _group(num_ranks: int, load: str, num_items: int, is_quick: bool) -> Iterator[_Group]:
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
    }
    ranks = [
        Contestant(__file__, load, num_items, int(is_quick), **world, RANK=rank, LOCAL_RANK=rank)
        for rank in range(num_ranks)
    ]
    try:
        for rank in ranks:
            rank.answer()  # ready
        yield _Group(ranks)
    finally:
        for rank in ranks:
            rank.close()
        for rank in ranks:
            rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _busy_s() -> float:
    """Seconds of all cores that were neither idle nor waiting for a disk, since the start."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# --- a rank -------------------------------------------------------------------------------------


def main() -> None:
    name, num_items, is_quick = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    with joined_ranks() as ranks:
        worker = Worker(num_items, small(LOADS[name]) if is_quick else LOADS[name], ranks)
        worker.run(WARM_UP_STEPS)
        take_turns_asked(
            {}, lambda word: worker.profile() if word == "profile" else worker.run(int(word))
        )


class Worker(Training):
    num_done = 0

    def run(self, steps: int) -> dict[str, float]:
        batches = [self.rows(self.num_done + index) for index in range(steps)]
        self.num_done += steps
        dist.barrier()
        start_s, cpu_start_s = time.monotonic(), time.process_time()
        for rows in batches:
            self.step(rows)
        return {
            "wall_s": time.monotonic() - start_s,
            "cpu_s": time.process_time() - cpu_start_s,
        }

    def profile(self) -> dict[str, Any]:
        """What `RanksRow` says of communication."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            took_s = self.run(PROFILED_STEPS)["wall_s"]
        spans: dict[str, list[tuple[float, float]]] = {}
        for event in profiler.events():
            if event.name.startswith("gloo:"):
                span = (event.time_range.start, event.time_range.end)
                spans.setdefault(event.name.removeprefix("gloo:"), []).append(span)
        spans.pop("barrier", None)
        under_way_us = _covered([span for of_kind in spans.values() for span in of_kind])
        return {
            "communication_share": round(under_way_us / 1e6 / took_s, 3),
            "communication_ms": {
                kind: round(_covered(of_kind) / 1000 / PROFILED_STEPS, 3)
                for kind, of_kind in spans.items()
            },
            "collectives": {
                kind: round(len(of_kind) / PROFILED_STEPS, 2) for kind, of_kind in spans.items()
            },
        }


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    main()
