"""One preparation by one engine, in processes of its own: its time and memory.

`python ingest_engines.py CONFIG.toml` is the local engine's program; Ray Data's is cluster.ingest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from turn_costs import MIB

from torchrec_pt.config_file import load_config
from torchrec_pt.data.prepare import prepare

PROGRAMS = {"local": [__file__], "ray": ["-m", "cluster.ingest"]}
_SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class Measured:
    """Attributes:
    prepare_s: without the start of Python and of Ray, which wall_s has.
    driver_mib: the largest resident size of the process that prepares.
    task_mib: the largest of a process of tasks, the pages of the object store that it has seen
        included; 0 where there are none.
    """

    prepare_s: float
    wall_s: float
    driver_mib: float
    task_mib: float


def measure(engine: str, config: Path, root: Path) -> Measured:
    """RuntimeError with its last words if it fails."""
    command = [sys.executable, *PROGRAMS[engine], str(config)]
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    )
    driver, task = 0, 0
    while process.poll() is None:
        driver = max(driver, _peak_bytes(process.pid))
        if engine == "ray":
            task = max([task, *map(_peak_bytes, _tasks_of(process.pid))])
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    wall_s = time.monotonic() - start
    output, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError((errors.strip().splitlines() or [f"exit {process.returncode}"])[-1])
    found = re.search(r"in ([\d.]+) s$", output.strip())
    assert found is not None, output
    return Measured(float(found[1]), round(wall_s, 2), round(driver / MIB, 1), round(task / MIB, 1))


def _tasks_of(driver: int) -> list[int]:
    """Ray's processes of tasks among the descendants of its driver."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            # "pid (name) state parent …"; a name may hold anything but ends at the last bracket.
            status = _read(folder / "stat").rpartition(")")[2].split()
            parents[int(folder.name)] = int(status[1]) if status else 0
    found, new = set(), {driver}
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in new} - found
    return [pid for pid in found if _read(Path(f"/proc/{pid}/cmdline")).startswith("ray::")]


def _peak_bytes(pid: int) -> int:
    """0 where the process is gone."""
    lines = _read(Path(f"/proc/{pid}/status")).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _read(path: Path) -> str:
    """Empty where the process is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    settings = load_config(Path(sys.argv[1]), ())
    start = time.monotonic()
    prepare(settings.data, settings.prepared_dir, settings.seed)
    print(f"in {time.monotonic() - start:.1f} s")
