"""The CUDA kernels of infonce, with their glue to torch, in the place of the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tests.simt.build import ROOT, Flavour, build_shared_library
from torchrec_pt import ops as _ops  # noqa: F401 - defines the operators

INFONCE = ROOT / "csrc" / "infonce"
DEVICE_SOURCES = sorted(INFONCE.glob("*.cu"))
TORCH = Path(torch.__file__).resolve().parent


def build(
    flavour: Flavour, *, device_sources: Sequence[Path] = DEVICE_SOURCES, flags: Sequence[str] = ()
) -> Path:
    return build_shared_library(
        "infonce",
        device_sources,
        flavour=flavour,
        host_sources=[INFONCE / "infonce_cuda.cpp", INFONCE / "infonce_check.cpp"],
        include_dirs=[TORCH / "include", TORCH / "include/torch/csrc/api/include"],
        flags=["-DTORCHREC_PT_SIMT", *flags],
        link_flags=[f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"],
    )


def load(library: Path) -> None:
    """From now on torchrec_pt::infonce_* of CPU tensors run the .cu sources in the executor."""
    torch.ops.load_library(library)
