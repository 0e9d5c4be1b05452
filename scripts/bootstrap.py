#!/usr/bin/env python3
"""Set up everything in .venv: torch, the requirements, the compiled operators.

    python3 scripts/bootstrap.py        (`make setup` is the same)

It is called bootstrap because it runs before anything is installed: it may import
nothing but the standard library. A second call returns at once; after a change of
csrc only the operators are built again; an interrupted set-up is finished by the
next call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "torchrec_pt-setup.json"
REQUIREMENTS = ROOT / "requirements"

EPILOG = """\
environment:
  TORCHREC_PT_DEVICE=cpu|cuda   decides what is otherwise seen from nvidia-smi
  TORCHREC_PT_TORCH_INDEX=URL   package index for torch alone; the small CPU-only wheels
                                are at https://download.pytorch.org/whl/cpu
  MAX_JOBS=N                    compiler processes at once (default: one per core)
"""


class SetupError(Exception):
    """The message is one line for the user."""


def answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def choose_device() -> str:
    """Prints what was seen and what follows from it."""
    wanted = os.environ.get("TORCHREC_PT_DEVICE", "")
    if wanted not in ("", "cpu", "cuda"):
        raise SetupError(f'TORCHREC_PT_DEVICE: must be "cpu" or "cuda", not "{wanted}"')
    has_gpu = answers("nvidia-smi")
    has_nvcc = shutil.which("nvcc") is not None
    device = wanted or ("cuda" if has_gpu else "cpu")
    reason = "TORCHREC_PT_DEVICE" if wanted else f"{'a' if has_gpu else 'no'} GPU was found"
    print(
        f"python {platform.python_version()}, {os.cpu_count()} cores, "
        f"GPU: {'yes' if has_gpu else 'no'}, nvcc: {'yes' if has_nvcc else 'no'} "
        f"-> set up for {device} ({reason})"
    )
    if device == "cuda" and not has_nvcc:
        print("no nvcc: the operators are built for the CPU alone")
    return device


def check_machine() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - it may well be started by an older one
        raise SetupError(
            f"Python 3.10 or newer is needed, this is {platform.python_version()}; "
            "choose another by make setup PYTHON=/path/to/python3"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise SetupError(f"no C++ compiler ({compiler}) was found; install g++ 11 or newer")


def digest(paths: Iterable[Path], *extra: str) -> str:
    state = hashlib.sha256(json.dumps(extra).encode())
    for path in sorted(paths):
        state.update(f"{path.relative_to(ROOT)}\0".encode())
        state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()


def read_stamp() -> dict[str, str]:
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict[str, str]) -> None:
    beside = STAMP.with_suffix(".new")
    beside.write_text(json.dumps(stamp, indent=2))
    beside.replace(STAMP)


def run_step(title: str, *command: str | Path) -> None:
    """Quiet where all goes well; what the command said where not."""
    print(f"{title} ...", end=" ", flush=True)
    start = time.monotonic()
    environment = {"MAX_JOBS": str(os.cpu_count() or 1), **os.environ}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        print("failed")
        print(done.stdout, file=sys.stderr)
        raise SetupError(f"{title}: exit code {done.returncode}; the output above says why")
    print(f"{time.monotonic() - start:.0f} s")


def pip_install(title: str, *arguments: str | Path) -> None:
    run_step(title, PYTHON, "-m", "pip", "install", "-q", *arguments)


def install_packages(device: str) -> None:
    same_python = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    if not answers(str(PYTHON), "-c", same_python):
        run_step("making .venv", sys.executable, "-m", "venv", "--clear", VENV)
    index = os.environ.get("TORCHREC_PT_TORCH_INDEX")
    from_index = ["--index-url", index] if index else []
    pip_install("installing torch", *from_index, "-r", REQUIREMENTS / "torch.txt")
    pip_install("installing torchrec and fbgemm", "--no-deps", "-r", REQUIREMENTS / f"{device}.txt")
    pip_install(
        "installing the rest",
        *("-r", REQUIREMENTS / "base.txt"),
        *("-r", REQUIREMENTS / "dev.txt"),
    )


def set_up() -> None:
    check_machine()
    device_override = os.environ.get("TORCHREC_PT_DEVICE", "")
    packages = digest(
        [*REQUIREMENTS.glob("*.txt"), Path(__file__).resolve()], sys.version, device_override
    )
    sources = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    extension = digest([ROOT / "setup.py", ROOT / "pyproject.toml", *sources], packages, str(ROOT))
    stamp = read_stamp()
    if stamp.get("packages") != packages:
        install_packages(choose_device())
        stamp = {"packages": packages}
        write_stamp(stamp)
    is_built = any((ROOT / "torchrec_pt").glob("_C.*"))
    if not is_built or stamp.get("extension") != extension:
        pip_install("building the operators", "--no-build-isolation", "--no-deps", "-e", ".")
        write_stamp({"packages": packages, "extension": extension})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    try:
        set_up()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
