#!/usr/bin/env python3
"""Compile and link the operators against a CUDA build of torch; needs nvcc, and no GPU.

    python3 scripts/cuda_build.py       (`make cuda-build` is the same)

Everything goes to build/cuda: an environment of its own with requirements/cuda-build.txt
(gigabytes), and the extension. At the end it is loaded, and must have a CUDA kernel for
every operator.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda"
PYTHON = FOLDER / "venv" / "bin" / "python"

LOAD = """
import importlib.util, sys
import torch

spec = importlib.util.spec_from_file_location("torchrec_pt._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info())
operators = ["infonce_forward", "infonce_backward"]
operators += ["infonce_symmetric_forward", "infonce_symmetric_backward"]
operators += ["philox", "sample_negatives", "sampled_softmax_forward"]
operators += ["sampled_softmax_backward_sparse", "sampled_softmax_backward_dense"]
for name in operators:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"torchrec_pt::{name}", "CUDA")
    assert has_kernel, f"{name} has no CUDA kernel"
print("CUDA kernels:", ", ".join(operators))
"""


def cuda_home(nvcc: str) -> Path:
    """The toolkit of nvcc; the program on the PATH may be a script that calls it."""
    beside = Path(nvcc).resolve().parent.parent
    candidates = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    for candidate in [*candidates, beside, Path("/usr/local/cuda")]:
        if (candidate / "include" / "cuda_runtime.h").exists():
            return candidate
    raise SystemExit("cuda-build: no include/cuda_runtime.h beside nvcc; set CUDA_HOME")


def main() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("cuda-build: nvcc was not found; install the CUDA toolkit")
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / "venv"], check=True)
    requirements = ROOT / "requirements" / "cuda-build.txt"
    subprocess.run([PYTHON, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    environment = os.environ | {"CUDA_HOME": str(cuda_home(nvcc))}
    environment.setdefault("MAX_JOBS", str(os.cpu_count()))
    build = [PYTHON, "setup.py", "-q", "build_ext", "--build-lib", FOLDER / "lib"]
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    (extension,) = (FOLDER / "lib" / "torchrec_pt").glob("_C*.so")
    subprocess.run([PYTHON, "-c", LOAD, extension], check=True)


if __name__ == "__main__":
    main()
