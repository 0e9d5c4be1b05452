"""Peak memory of forward and backward of one contestant of bench_sampled_softmax.py.

A sparse gradient counts with its indices and values. A small step first loads the code; what is
compiled needs one of full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, replace

from peak_memory import Peak, answer, ask, measure_peak
from sampled_softmax_losses import SECTIONS, Size, build_problem, section_contestants
from torch import Tensor

WARM_UP_ROWS = 64
WARM_UP_ITEMS = 10_000


def peak_memory(section: str, what: str, size: Size, device: str) -> Peak:
    """Measured by this file, run as a program; RuntimeError with its last words if it fails."""
    return ask(__file__, section, what, *astuple(size), device)


def _measure(section: str, what: str, *size_and_device: str) -> Peak:
    *numbers, device = size_and_device
    size = Size(*map(int, numbers))
    contestant = section_contestants(section)[what]
    small = replace(size, num_rows=WARM_UP_ROWS, num_items=min(WARM_UP_ITEMS, size.num_items))
    warm_up_size = size if contestant.is_compiled else small
    contestant.gradients(build_problem(SECTIONS[section], warm_up_size, device))
    problem = build_problem(SECTIONS[section], size, device)

    def step() -> list[Tensor]:
        return [part for grad in contestant.gradients(problem) for part in _parts(grad)]

    return measure_peak(step, problem.tensors, device)


def _parts(gradient: Tensor) -> Iterator[Tensor]:
    if gradient.is_sparse:
        yield gradient.indices()
        yield gradient.values()
    else:
        yield gradient


if __name__ == "__main__":
    answer(_measure)
