"""What ptxas says of the kernels on every architecture; needs nvcc, and no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(ROOT.glob("csrc/**/*.cu"))
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
NVCC = shutil.which("nvcc")
# The I of a template: the name of the source is part of all mangled names.
TILED = ("infonce_forwardI", "infonce_backwardI")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")

REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'\n"
    r".*\n"  # function properties for
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    stack_bytes: int
    spilled_bytes: int
    registers: int


def compile_for(source: Path, architecture: str, folder: Path) -> list[Kernel]:
    assert NVCC is not None
    target = folder / f"{source.stem}.{architecture}.o"
    command = [NVCC, "-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v"]
    command += [f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [
        Kernel(
            name=found["name"],
            architecture=found["architecture"],
            stack_bytes=int(found["stack"]),
            spilled_bytes=int(found["stores"]) + int(found["loads"]),
            registers=int(found["registers"]),
        )
        for found in REPORT.finditer(done.stderr)
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    folder = tmp_path_factory.mktemp("ptxas")
    jobs = [(source, name) for source in SOURCES for name in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda job: compile_for(*job, folder), jobs))
    # One that the pattern overlooks would pass every test below.
    assert all(reports)
    return [kernel for report in reports for kernel in report]


def test_every_kernel_is_reported_for_every_architecture(kernels: list[Kernel]) -> None:
    names = {
        name: sorted(kernel.name for kernel in kernels if kernel.architecture == name)
        for name in ARCHITECTURES
    }
    # Four dims, four kinds of numbers, in one and in both directions, or for queries and keys.
    for of in TILED:
        assert sum(of in name for name in names["sm_80"]) == 4 * 4 * 2
    # An anonymous namespace gets another name in each compilation.
    assert len({len(found) for found in names.values()}) == 1


def test_no_kernel_spills_or_uses_local_memory(kernels: list[Kernel]) -> None:
    assert "\n".join(str(k) for k in kernels if k.spilled_bytes or k.stack_bytes) == ""


def test_registers_allow_two_blocks_a_multiprocessor(kernels: list[Kernel]) -> None:
    # 65,536 registers, given to warps in units of 256; shared memory is asserted in the source.
    num_warps, available = 4, 65_536
    for kernel in kernels:
        if any(of in kernel.name for of in TILED):
            of_warp = -(-kernel.registers * 32 // 256) * 256
            assert 2 * num_warps * of_warp <= available, kernel
