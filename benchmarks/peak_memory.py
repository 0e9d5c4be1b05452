"""Peak memory of one step, in a process of its own.

On the CPU: the largest resident size (VmHWM, set back before the step) against the resident size
before. Torch asks for nothing else meanwhile; malloc returns every freed tensor at once
(MALLOC_MMAP_THRESHOLD_). On CUDA: torch.cuda.max_memory_allocated against memory_allocated.

A program that measures has `answer(measure)` as its main function; `ask(program, …)` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from turn_costs import MIB, status_bytes


@dataclass(frozen=True)
class Peak:
    total_mib: float  # with inputs and gradients
    extra_mib: float  # without


def ask(program: str, *arguments: object) -> Peak:
    """What the program measures; RuntimeError with its last words if it fails."""
    command = [sys.executable, program, *map(str, arguments), str(torch.get_num_threads())]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(words[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def answer(measure: Callable[..., Peak]) -> None:
    """Measures with the arguments of the command line, but for the last: the threads."""
    *arguments, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        peak = measure(*arguments)
    except torch._dynamo.exc.TorchDynamoException as error:
        sys.exit(str(error).splitlines()[0])
    print(json.dumps(asdict(peak)))


def measure_peak(
    step: Callable[[], Iterable[Tensor]], inputs: Iterable[Tensor], device: str
) -> Peak:
    """Of a step that returns its gradients; everything must be loaded and compiled before."""
    before = _now_bytes(device)
    _reset_peak(device)
    gradients = step()
    grown = _peak_bytes(device) - before
    num_input_bytes = sum(tensor.nbytes for tensor in inputs)
    num_output_bytes = sum(gradient.nbytes for gradient in gradients)
    return Peak((grown + num_input_bytes) / MIB, (grown - num_output_bytes) / MIB)


def _now_bytes(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else status_bytes("VmRSS")


def _peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
