"""The executor runs right kernels right, in any order, and names what is wrong with the others.

The kernels are those of cases/; the parameters below are names of cases in cases/main.cu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simt.build import (
    COMPILER,
    ROOT,
    SIMT,
    Flavour,
    build_program,
    build_shared_library,
    sanitized_environment,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

SEEDS = (0, 1, 2)
FLAGS = (f"-I{SIMT}",)

RIGHT = (
    "atomics",
    "block_sums",
    "copies",
    "indices",
    "limits",
    "many_barriers",
    "numbers",
    "product_bf16",
    "product_bf16_transposed",
    "product_fp16",
    "product_fp16_transposed",
    "product_tf32",
    "product_tf32_transposed",
    "rows",
    "unrounded_tf32",
    "votes",
    "warp_exchange",
)

# What the message says: the rule, and the thing that tells it from others.
WRONG = {
    "atomic_and_plain": ("data race", "thread (5, 0, 0)"),
    "barrier_after_exit": ("divergent barrier", "for thread (40, 0, 0), which has exited"),
    "barrier_in_two_places": ("divergent barrier", "for thread (32, 0, 0), which waits at"),
    "blocks_that_read_each_other": ("data race", "a thread of another block wrote"),
    "copies_without_barrier": ("copy in flight|data race", "shared bytes"),
    "copies_without_commit": ("copy in flight|unfinished copy", "cp.async"),
    "copies_without_wait": ("copy in flight", "by a cp.async not yet waited for"),
    "copies_without_wait_at_the_end": ("unfinished copy", "ends without waiting"),
    "ldmatrix_in_two_places": ("divergent collective", "ldmatrix"),
    "many_barriers_but_one": ("data race", "no barrier between"),
    "misaligned_vector": ("misaligned", "16 bytes"),
    "product_with_misaligned_copy": ("misaligned", "destination is not aligned to 16 bytes"),
    "product_with_misaligned_row": ("misaligned", "ldmatrix"),
    "product_with_one_lane_too_few": ("divergent collective", "which waits at __syncwarp"),
    "product_with_swapped_b": ("not so", "the product is right"),
    "product_without_barrier_before_overwrite": (
        "data race",
        "begins a cp.async that overwrites shared bytes",
    ),
    "product_without_barrier_before_read": ("data race|copy in flight", "reads, by ldmatrix"),
    "product_without_wait": ("copy in flight", "reads, by ldmatrix"),
    "rows_of_other_blocks": ("data race", "a thread of another block wrote"),
    "shared_read_past_the_end": ("out of bounds", "reads 4 bytes at offset 256 of 256"),
    "shared_write_before_the_start": ("out of bounds", "writes 4 bytes at offset -4 of 256"),
    "shuffle_after_exit": ("divergent collective", "which has exited"),
    "shuffle_and_barrier": ("divergent collective", "which waits at __syncthreads"),
    "shuffle_and_vote": ("divergent collective", "vote"),
    "shuffle_from_outside_mask": ("wrong mask", "which takes no part"),
    "shuffle_outside_mask": ("wrong mask", "leaves its own lane out"),
    "sums_without_barrier": ("data race", "shared bytes"),
    "trap": ("trap", "thread (9, 0, 0): calls __trap at rules.cuh:"),
    "warp_exchange_without_barrier": ("data race", "no barrier between"),
}


@pytest.fixture(scope="session")
def programs() -> dict[Flavour, Path]:
    main = SIMT / "cases" / "main.cu"
    flavours: tuple[Flavour, ...] = ("races", "sanitized")
    return {at: build_program("cases", [main], flavour=at, flags=FLAGS) for at in flavours}


def run_case(program: Path, case: str, seed: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SIMT_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), case]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def run_all(program: Path, cases: tuple[str, ...], seed: int) -> dict[str, str]:
    """What each case that did not pass has to say."""
    done = {case: run_case(program, case, seed) for case in cases}
    return {case: run.stdout + run.stderr for case, run in done.items() if run.returncode != 0}


def test_every_case_is_expected_to_do_something(programs: dict[Flavour, Path]) -> None:
    listed = run_case(programs["races"], "", 0).stdout.split()[2:]
    sanitizers = {"global_read_past_the_end", "copy_past_the_end"}
    assert set(listed) == {*RIGHT, *WRONG, *sanitizers}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("flavour", ["races", "sanitized"])
def test_right_kernels_pass(programs: dict[Flavour, Path], flavour: Flavour, seed: int) -> None:
    assert run_all(programs[flavour], RIGHT, seed) == {}


@pytest.mark.parametrize("case", WRONG)
def test_planted_fault_is_named(programs: dict[Flavour, Path], case: str) -> None:
    rules, detail = WRONG[case]
    for seed in SEEDS:
        run = run_case(programs["races"], case, seed)
        assert run.returncode == 1
        assert run.stdout.count("\n") == 1
        assert any(rule in run.stdout for rule in rules.split("|")), run.stdout
        assert detail in run.stdout


def test_sanitizer_finds_load_past_a_global_array(programs: dict[Flavour, Path]) -> None:
    run = run_case(programs["sanitized"], "global_read_past_the_end", 0)
    assert "heap-buffer-overflow" in run.stderr
    assert "read_past_end" in run.stderr


def test_sanitizer_finds_copy_past_a_global_array(programs: dict[Flavour, Path]) -> None:
    run = run_case(programs["sanitized"], "copy_past_the_end", 0)
    assert "reads global memory that is not allocated" in run.stdout


def test_sanitizer_finds_read_past_shared_memory(programs: dict[Flavour, Path]) -> None:
    run = run_case(programs["sanitized"], "shared_read_past_the_end", 0)
    assert "AddressSanitizer: use-after-poison" in run.stderr


BESIDE_TORCH = """
import ctypes
import sys

import torch

library = ctypes.CDLL(sys.argv[1])
values = torch.arange(1000, dtype=torch.float32)
sums = torch.zeros(4)
message = ctypes.create_string_buffer(500)


def run(num, broken):
    at = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, sums)]
    failed = library.sum_blocks_of_256(*at, num, broken, message, ctypes.c_size_t(500))
    return message.value.decode() if failed else ""


assert run(1000, 0) == ""
assert sums.tolist() == [values[i : i + 256].sum().item() for i in range(0, 1000, 256)]
print(run(1000, 1))
sys.stdout.flush()
print(run(1008, 0))
"""


@pytest.mark.parametrize("flavour", ["races", "sanitized"])
def test_library_runs_in_python_beside_torch(flavour: Flavour) -> None:
    source = SIMT / "cases" / "library.cu"
    library = build_shared_library("library", [source], flavour=flavour, flags=FLAGS)
    run = subprocess.run(
        [sys.executable, "-c", BESIDE_TORCH, str(library)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=sanitized_environment() if flavour == "sanitized" else None,
        timeout=120,
    )
    # Which tells of both: kernels see torch's memory, and each flavour finds what it is for.
    if flavour == "races":
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("simt: data race: kernel cases::sum_blocks<true>, block (")
    else:
        assert run.returncode != 0
        assert "heap-buffer-overflow" in run.stderr
        assert "sum_blocks<false>" in run.stderr
