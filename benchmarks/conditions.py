"""What a benchmark is asked for on the command line, and the header and file of its result."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from torchrec_pt.ops import build_info

ROOT = Path(__file__).resolve().parent.parent


def build_parser(
    doc: str | None, sections: Sequence[str], rounds_help: str
) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help=rounds_help)
    parser.add_argument("--only", choices=sections)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the code")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="the result's path without .json and .png")
    return parser


def default_out(name: str) -> Path:
    return ROOT / "benchmarks/results" / name


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        lines = cpu_info.read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {os.cpu_count()} cores, {platform.machine()} {capability}"


def commit() -> str:
    """Of the sources, with "-dirty" where they differ from it."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    return subprocess.check_output(describe, cwd=ROOT, text=True).strip()


def conditions(device: str) -> dict[str, object]:
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "load_before": _load(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": build_info(),
    }


def write_json(out: Path, header: dict[str, object], found: dict[str, object]) -> None:
    """To `out`.json: the header, the load now, what was found."""
    result = header | {"load_after": _load()} | found
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


def _load() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()]
