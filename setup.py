"""Builds torchrec_pt._C from csrc: with CUDA where torch, nvcc and a .cu file are all there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "8.0;9.0;10.0"
CXX_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
NVCC_FLAGS = ["-O3", "-std=c++20"]

if sys.platform.startswith("linux"):
    CXX_FLAGS.append("-fopenmp")  # at::parallel_for is serial without it

# torchrec_pt/extension.py, without importing the package, whose needs are not installed yet.
spec = importlib.util.spec_from_file_location("extension", ROOT / "torchrec_pt" / "extension.py")
extension: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)


def sources(suffix: str) -> list[str]:
    """Relative to the root, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/*{suffix}"))


def cuda_is_buildable() -> bool:
    nvcc = shutil.which("nvcc") or (CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists())
    return bool(torch.version.cuda and nvcc and sources(".cu"))


def cuda_include_dirs() -> list[str]:
    """torch's headers want cusparse.h and its kin, which a toolkit alone may lack."""
    packages = Path(torch.__file__).parent.parent / "nvidia"
    return sorted(str(path) for path in packages.glob("cu*/include"))


def build_extension() -> Any:
    with_cuda = cuda_is_buildable()
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS) if with_cuda else "none"
    macros: list[tuple[str, str | None]] = [
        ("TORCHREC_PT_CXX_FLAGS", f'"{" ".join(CXX_FLAGS)}"'),
        ("TORCHREC_PT_CUDA_ARCHS", f'"{archs}"'),
    ]
    include_dirs = [str(ROOT / "csrc")]
    if not with_cuda:
        return CppExtension(
            "torchrec_pt._C",
            [path for path in sources(".cpp") if not path.endswith("_cuda.cpp")],
            include_dirs=include_dirs,
            define_macros=macros,
            extra_compile_args={"cxx": CXX_FLAGS},
        )
    return CUDAExtension(
        "torchrec_pt._C",
        sources(".cpp") + sources(".cu"),
        include_dirs=include_dirs + cuda_include_dirs(),
        define_macros=[*macros, ("TORCHREC_PT_WITH_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )


class IncrementalBuild(BuildExtension):
    """Keeps the object files, so that a changed source is all that is compiled again."""

    def finalize_options(self) -> None:
        super().finalize_options()
        objects = "objects-cuda" if cuda_is_buildable() else "objects"
        self.build_temp = str(ROOT / "build" / objects)

    def run(self) -> None:
        super().run()
        built = Path(self.get_ext_fullpath("torchrec_pt._C"))
        built.with_name(extension.SOURCES).write_text(extension.digest_of(ROOT))


setup(
    packages=find_packages(include=["torchrec_pt", "torchrec_pt.*", "cluster", "cluster.*"]),
    ext_modules=[build_extension()],
    cmdclass={"build_ext": IncrementalBuild},
)
