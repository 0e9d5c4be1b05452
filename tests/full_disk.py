"""Runs on disks that are too small, each finished once there is space; a line of JSON for each.

python full_disk.py CONFIG.toml FOLDER SIZE_KIB...

Mounts a tmpfs on FOLDER, so it wants to be root, or inside `unshare -Urm`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torchrec_pt import cli, pipeline, report, tables  # once, not in every child

assert pipeline
assert report
assert tables
ENOUGH_KIB = 1 << 14


def main(config: str, folder: Path, sizes_kib: list[int]) -> None:
    for size_kib in sizes_kib:
        mount(folder, f"size={size_kib}k")
        try:
            first = call(config, folder / "run")
            mount(folder, f"remount,size={ENOUGH_KIB}k")
            again = call(config, folder / "run")
            result = folder / "run/evaluate/result.json"
            line = {
                "size_kib": size_kib,
                "first": first,
                "again": again,
                "result": json.loads(result.read_text()) if result.is_file() else None,
            }
            print(json.dumps(line), flush=True)
        finally:
            subprocess.run(["umount", folder], check=True)


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)


def call(config: str, run_dir: Path) -> dict[str, Any]:
    """The whole run in a process of its own; its exit code, its complaints, and what it left."""
    said = run_dir.parent.with_suffix(".stderr")
    child = multiprocessing.get_context("fork").Process(target=run, args=(config, run_dir, said))
    child.start()
    child.join()
    left: dict[str, int] = {}
    counted: set[int] = set()  # names of one file take its space once
    for path in sorted(path for path in run_dir.rglob("*") if path.is_file()):
        about = path.stat()
        left[str(path.relative_to(run_dir))] = 0 if about.st_ino in counted else about.st_size
        counted.add(about.st_ino)
    return {"code": child.exitcode, "complained": said.read_text(), "left": left}


def run(config: str, run_dir: Path, said: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = ["torchrec-pt", "run", config, "--set", f"run_dir={run_dir}"]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(word) for word in sys.argv[3:]])
