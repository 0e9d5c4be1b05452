"""What a turn costs: time and memory; of the standard library alone, for peers too."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20


def costs_of(turn: Callable[[], object]) -> dict[str, Any]:
    """CPU and wall seconds; the largest resident size meanwhile, and by how much it grew."""
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    before, cpu, wall = status_bytes("VmRSS"), time.process_time(), time.monotonic()
    turn()
    cpu_s, wall_s = time.process_time() - cpu, time.monotonic() - wall
    peak = status_bytes("VmHWM")
    return {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_mib": peak / MIB,
        "extra_mib": (peak - before) / MIB,
    }


def status_bytes(field: str) -> int:
    """Of this process: VmRSS, its resident size, or VmHWM, the largest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
