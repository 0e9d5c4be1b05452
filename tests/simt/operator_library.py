"""The CUDA kernels of an operator, with their glue to torch, in the place of its CPU kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.simt.build import ROOT, Flavour, build_shared_library
from torchrec_pt import ops as _ops  # noqa: F401 - defines the operators

TORCH = Path(torch.__file__).resolve().parent
# Every folder of csrc that has kernels.
OPERATORS = sorted({path.parent.name for path in ROOT.glob("csrc/*/*_cuda.cpp")})


def device_sources(operator: str) -> list[Path]:
    return sorted((ROOT / "csrc" / operator).glob("*.cu"))


def build(
    operator: str,
    flavour: Flavour,
    *,
    sources: Sequence[Path] | None = None,
    device_flags: Sequence[str] = (),
) -> Path:
    """Of the operator's own device sources, or of others in their place."""
    folder = ROOT / "csrc" / operator
    return build_shared_library(
        operator,
        device_sources(operator) if sources is None else sources,
        flavour=flavour,
        host_sources=sorted([*folder.glob("*_cuda.cpp"), *folder.glob("*_check.cpp")]),
        include_dirs=[TORCH / "include", TORCH / "include/torch/csrc/api/include"],
        flags=["-DTORCHREC_PT_SIMT"],
        device_flags=device_flags,
        link_flags=[f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"],
    )


def load(library: Path) -> None:
    """From now on its operators of CPU tensors run the .cu sources in the executor."""
    torch.ops.load_library(library)


def run_tests(
    operator: str,
    tests: Sequence[Path],
    environment: Mapping[str, str],
    *options: str,
    timeout_s: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Of the operator, by pytest in a process of its own (run_on_executor.py)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.simt.run_on_executor"]
    command += ["-p", "no:cacheprovider", *options, *map(str, tests)]
    chosen = {"SIMT_OPERATORS": operator, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, **chosen},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def tests_of(operator: str) -> list[Path]:
    return sorted(ROOT.glob(f"tests/ops/test_{operator}*.py"))
