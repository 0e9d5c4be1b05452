"""The CUDA sources of infonce, by all tests of the operator that are not about the CPU alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.simt import infonce_library
from tests.simt.build import COMPILER, ROOT, Flavour, sanitized_environment

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

FLAVOURS: list[Flavour] = ["races", "sanitized"]
SEEDS = [0, 1, 2]
FEWEST_TESTS = 150  # leaving out what is about the CPU must not leave out everything


def run_tests(flavour: Flavour, seed: int) -> subprocess.CompletedProcess[str]:
    environment = sanitized_environment() if flavour == "sanitized" else dict(os.environ)
    environment |= {"SIMT_FLAVOUR": flavour, "SIMT_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.simt.run_on_executor"]
    command += ["-p", "no:cacheprovider", "tests/ops", "tests/simt/on_executor.py"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


Runs = dict[tuple[Flavour, int], Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    for flavour in FLAVOURS:
        infonce_library.build(flavour)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (flavour, seed): pool.submit(run_tests, flavour, seed)
            for flavour in FLAVOURS
            for seed in SEEDS
        }


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_cuda_source_passes_the_tests_of_the_operator(
    runs: Runs, flavour: Flavour, seed: int
) -> None:
    done = runs[flavour, seed].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    (num_passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(num_passed) >= FEWEST_TESTS
