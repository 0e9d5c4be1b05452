#!/usr/bin/env python3
"""Environments for the peers, each its own, in build/peers: RecBole and RecTools.

    python benchmarks/peers/environments.py        (`make peers` is the same)

They want other versions of NumPy, pydantic and the like than torchrec_pt. A second call returns at
once; one that was interrupted begins that environment anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent.parent / "build/peers"
COMMON = [
    "torch==2.13.0",
    "numpy<2",
    "pandas<3",
    "scipy",
    "scikit-learn",
    "pyyaml",
    "tqdm",
    "psutil",
]
# What each wants beside; then what is installed without what it asks for, since that cannot be had
# together (RecBole asks for ray, for its tuning alone).
REQUIREMENTS = {
    "recbole": (
        ["tensorboard", "tabulate", "plotly", "texttable", "colorlog==4.7.2", "colorama==0.4.4"],
        ["recbole==1.2.1", "thop"],
    ),
    "rectools": (
        [
            "joblib",
            "attrs<24",
            "fastrlock<0.9",
            "pydantic>=2.8.2,<3",
            "typeguard>=4.1,<5",
            "pytorch-lightning",
        ],
        ["rectools==0.19.0", "implicit==0.7.3"],
    ),
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment; SystemExit where `make peers` has not made it."""
    python = PEERS / peer / "bin/python"
    if not python.exists():
        raise SystemExit(f"{python}: not there; `make peers` installs it")
    return python


def install(peer: str) -> None:
    target = PEERS / peer
    whole = target / "installed.txt"  # written last: what is here without it is half of one
    wanted, alone = REQUIREMENTS[peer]
    listed = "\n".join([*COMMON, *wanted, *alone]) + "\n"
    if whole.exists() and whole.read_text() == listed:
        return
    shutil.rmtree(target, ignore_errors=True)
    print(f"{peer}: installing into {target}", flush=True)
    venv.create(target, with_pip=True)
    pip = [str(target / "bin/python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *COMMON, *wanted], check=True)
    subprocess.run([*pip, "--no-deps", *alone], check=True)
    whole.write_text(listed)


def main() -> None:
    for peer in REQUIREMENTS:
        try:
            install(peer)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{peer}: pip exited with {error.returncode}; run again to begin anew")


if __name__ == "__main__":
    main()
