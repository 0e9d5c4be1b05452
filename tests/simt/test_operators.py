"""The CUDA sources of each operator, by all of its tests that are not about the CPU alone."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.simt import operator_library
from tests.simt.build import COMPILER, ROOT, Flavour, sanitized_environment

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

FLAVOURS: list[Flavour] = ["races", "sanitized"]
SEEDS = [0, 1, 2]
# Leaving out what is about the CPU must not leave out everything.
FEWEST_TESTS = {"infonce": 150, "negatives": 100, "sampled_softmax": 200}


def run_tests(operator: str, flavour: Flavour, seed: int) -> subprocess.CompletedProcess[str]:
    environment = sanitized_environment() if flavour == "sanitized" else dict(os.environ)
    environment |= {"SIMT_FLAVOUR": flavour, "SIMT_SEED": str(seed)}
    tests = operator_library.tests_of(operator)
    tests += ROOT.glob(f"tests/simt/{operator}_on_executor.py")
    return operator_library.run_tests(operator, tests, environment)


Runs = dict[tuple[str, Flavour, int], Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    cases = [(o, f, s) for o in operator_library.OPERATORS for f in FLAVOURS for s in SEEDS]
    for operator in operator_library.OPERATORS:
        for flavour in FLAVOURS:
            operator_library.build(operator, flavour)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {case: pool.submit(run_tests, *case) for case in cases}


def test_every_operator_with_kernels_is_run() -> None:
    assert set(operator_library.OPERATORS) == FEWEST_TESTS.keys()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("operator", FEWEST_TESTS)
def test_the_cuda_source_passes_the_tests_of_the_operator(
    runs: Runs, operator: str, flavour: Flavour, seed: int
) -> None:
    done = runs[operator, flavour, seed].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    (num_passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(num_passed) >= FEWEST_TESTS[operator]
