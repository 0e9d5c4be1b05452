"""Peak memory of forward and backward of one contestant of bench_infonce.py.

A small step first loads the code; torch.compile needs one of full size, to compile.
"""

from __future__ import annotations

import functools

from infonce_losses import CONTESTANTS, build_problem
from peak_memory import Peak, answer, ask, measure_peak

WARM_UP_ROWS = 256


def peak_memory(direction: str, what: str, size: tuple[int, int], device: str) -> Peak:
    """Measured by this file, run as a program; RuntimeError with its last words if it fails."""
    return ask(__file__, direction, what, *size, device)


def _measure(direction: str, what: str, num_rows: str, dim: str, device: str) -> Peak:
    contestant = CONTESTANTS[direction][what]
    size = int(num_rows), int(dim)
    warm_up_size = size if what == "torch.compile" else (WARM_UP_ROWS, size[1])
    contestant.gradients(build_problem(*warm_up_size, device))
    problem = build_problem(*size, device)
    inputs = (problem.query, problem.keys, problem.target)
    return measure_peak(functools.partial(contestant.gradients, problem), inputs, device)


if __name__ == "__main__":
    answer(_measure)
