"""The CUDA kernels of an operator, with their glue to torch, in the place of its CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
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
