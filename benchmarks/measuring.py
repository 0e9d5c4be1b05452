"""How the benchmarks measure: contestants in turns, time, quantiles, errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def elapsed_ms(step: Callable[[], object], device: str) -> float:
    """CPU time per thread, or the device's."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    before = time.process_time()
    step()
    return (time.process_time() - before) * 1000 / torch.get_num_threads()


def take_turns(
    steps: dict[str, Callable[[], object]], rounds: dict[str, int], device: str
) -> dict[str, list[float]]:
    """Milliseconds of each step; those with fewer rounds leave the last ones out."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(max(rounds.values())):
        for name in rotated(names, index):
            if index < rounds[name]:
                times[name].append(elapsed_ms(steps[name], device))
    return times


def rotated(names: Sequence[T], turn: int) -> list[T]:
    """In the order of a turn, so that each is the first as often as the others."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    p20, p50, p80 = (round(float(q), 3) for q in np.quantile(values, (0.2, 0.5, 0.8)))
    return p20, p50, p80


def relative_error(value: Tensor, right: Tensor) -> float:
    """The largest error to the largest entry."""
    return float((value.detach().double().cpu() - right).abs().max() / right.abs().max())
