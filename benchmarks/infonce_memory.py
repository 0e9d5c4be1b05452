"""Peak memory of forward and backward of one contestant, in a process of its own.

On the CPU: the largest resident size (VmHWM, set back before the step) against the resident size
before. Torch asks for nothing else meanwhile; malloc returns every freed tensor at once
(MALLOC_MMAP_THRESHOLD_). A small step first loads the code; torch.compile needs one of full size,
to compile. On CUDA: torch.cuda.max_memory_allocated against memory_allocated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from infonce_losses import CONTESTANTS, build_problem

MIB = 2**20
WARM_UP_ROWS = 256


@dataclass(frozen=True)
class Peak:
    total_mib: float  # with inputs and gradients
    extra_mib: float  # without


def peak_memory(direction: str, what: str, size: tuple[int, int], device: str) -> Peak:
    """Measured by this file, run as a program; RuntimeError with its last words if it fails."""
    command = [sys.executable, __file__, direction, what, *map(str, size), device]
    command.append(str(torch.get_num_threads()))
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(words[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _measure(direction: str, what: str, size: tuple[int, int], device: str) -> Peak:
    contestant = CONTESTANTS[direction][what]
    warm_up_size = size if what == "torch.compile" else (WARM_UP_ROWS, size[1])
    contestant.gradients(build_problem(*warm_up_size, device))
    problem = build_problem(*size, device)
    before = _now_bytes(device)
    _reset_peak(device)
    gradients = contestant.gradients(problem)
    grown = _peak_bytes(device) - before
    inputs = sum(t.nbytes for t in (problem.query, problem.keys, problem.target))
    outputs = sum(gradient.nbytes for gradient in gradients)
    return Peak((grown + inputs) / MIB, (grown - outputs) / MIB)


def _now_bytes(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status_bytes("VmRSS")


def _peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    direction, what, num_rows, dim, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        peak = _measure(direction, what, (int(num_rows), int(dim)), device)
    except torch._dynamo.exc.TorchDynamoException as error:
        sys.exit(str(error).splitlines()[0])
    print(json.dumps(asdict(peak)))


if __name__ == "__main__":
    main()
