"""infonce on a GPU: the numbers of the CPU, and what only a GPU can show."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_infonce import all_options, make
from torchrec_pt.ops import infonce_logsumexp, infonce_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

Problem = dict[str, Any]

DIMS = [8, 32, 40, 64, 100, 128, 256]
SIZES = [(1, 1), (67, 201), (300, 1025)]
LEAVES = ("query", "keys", "temperature", "key_bias")
MIB = 2**20

# Largest errors beside the CPU's float32: of a loss, relative to 1 + the largest logit, and of a
# gradient, relative to its largest entry.
FLOAT32_BOUNDS = {
    "highest": (1e-5, 1e-4),
    # tf32 rounds each factor by 2^-11: a logit of norm products s by up to s / 1024.
    "high": (2.0**-9, 2e-2),
}
# The logits are float32; ds and the gradient itself are rounded to 16 bits.
BOUNDS_16 = {torch.bfloat16: (1e-4, 2.0**-7), torch.float16: (1e-4, 2.0**-10)}


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def problem_of(
    num_rows: int, num_keys: int, dim: int, *, symmetric: bool, dtype: torch.dtype
) -> Problem:
    """Every option at once; logits of about the same size for each dim."""
    problem: Problem = make(num_rows, num_keys, dim) | all_options(num_rows, num_keys)
    for name in ("query", "keys"):
        problem[name] = (problem[name] / dim**0.25).to(dtype)
    problem["row_weight"] = torch.linspace(0, 2, num_rows)
    if symmetric:
        del problem["target"]
    return problem | {"symmetric": symmetric}


def on(device: str, problem: Problem) -> tuple[Problem, list[Tensor]]:
    """A copy of the problem on a device, and its leaves."""
    moved = {n: v.detach().to(device) if isinstance(v, Tensor) else v for n, v in problem.items()}
    names = [name for name in LEAVES if name in moved]
    for name in names:
        moved[name] = moved[name].clone().requires_grad_()
    return moved, [moved[name] for name in names]


def loss_and_gradients(problem: Problem, device: str) -> list[Tensor]:
    """The losses of the rows; then the gradients under an arbitrary upstream."""
    moved, leaves = on(device, problem)
    loss = infonce_loss(**moved, reduction="none")
    upstream = torch.linspace(-1, 2, len(loss), device=device)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves)]


def assert_matches_cpu(problem: Problem, loss_bound: float, gradient_bound: float) -> None:
    loss, *grads = loss_and_gradients(problem, "cuda")
    wide = problem | {name: problem[name].float() for name in ("query", "keys")}
    expected_loss, *expected_grads = loss_and_gradients(wide, "cpu")
    reach = problem["query"].float().norm(dim=1).max() * problem["keys"].float().norm(dim=1).max()
    scale = 1 + reach / float(problem["temperature"])
    assert (loss.cpu() - expected_loss).abs().max() <= 2 * loss_bound * scale
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.is_cuda
        largest = max(expected.abs().max().item(), 1e-3)
        error = (grad.cpu().float() - expected.float()).abs().max()
        assert error <= gradient_bound * largest + 1e-6 * scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", FLOAT32_BOUNDS)
def test_float32_matches_the_cpu(precision: None, name: str, dim: int, symmetric: bool) -> None:
    torch.set_float32_matmul_precision(name)
    for size in SIZES:
        problem = problem_of(*size, dim, symmetric=symmetric, dtype=torch.float32)
        assert_matches_cpu(problem, *FLOAT32_BOUNDS[name])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", BOUNDS_16)
def test_16_bits_match_the_cpu(dtype: torch.dtype, dim: int, symmetric: bool) -> None:
    for size in SIZES:
        problem = problem_of(*size, dim, symmetric=symmetric, dtype=dtype)
        assert_matches_cpu(problem, *BOUNDS_16[dtype])


def test_more_row_tiles_than_are_kept_at_once_match_the_cpu() -> None:
    problem = problem_of(9000, 9100, 16, symmetric=True, dtype=torch.float32)
    assert_matches_cpu(problem, *FLOAT32_BOUNDS["highest"])


@pytest.mark.parametrize("dim", DIMS)
def test_logsumexp_matches_the_cpu(dim: int) -> None:
    problem = problem_of(67, 1025, dim, symmetric=True, dtype=torch.float32)
    for name in ("symmetric", "row_weight", "key_ids", "log_q_positive"):
        del problem[name]
    upstream = torch.linspace(-1, 2, 67)
    runs = []
    for device in ("cuda", "cpu"):
        moved, leaves = on(device, problem)
        lse = infonce_logsumexp(**moved)
        grads = torch.autograd.grad(lse @ upstream.to(device), leaves)
        runs.append([value.detach().cpu() for value in (lse, *grads)])
    for ours, expected in zip(*runs, strict=True):
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_row_with_nothing_but_its_target_gives_zero_and_no_gradient(symmetric: bool) -> None:
    problem: Problem = make(300, 300, 40)
    del problem["target"]
    problem |= {"query_ids": torch.zeros(300, dtype=torch.long), "symmetric": symmetric}
    loss, *grads = loss_and_gradients(problem | {"temperature": torch.tensor(0.3)}, "cuda")
    assert torch.count_nonzero(loss) == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads[:2])


# --- where the tensors are, and when ------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, torch.tensor(0.3), torch.tensor(0.3).double()])
def test_the_temperature_may_be_anywhere(temperature: Any) -> None:
    query, keys = torch.randn(50, 24, device="cuda"), torch.randn(60, 24, device="cuda")
    expected = infonce_loss(query, keys, temperature=torch.tensor(0.3, device="cuda"))
    assert torch.equal(infonce_loss(query, keys, temperature=temperature), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    wide = torch.randn(200, 200, device="cuda").to(dtype)
    # A transpose, every second row and column, rows that start between 16 bytes, one row for all.
    queries = [wide[:40, :80].T, wide[::2, ::2][:80, :40], wide[:80, 1:41], wide[:1, :40]]
    keys = wide[100:, 3:43]
    options: dict[str, Tensor] = {
        "key_bias": torch.randn((), device="cuda").expand(100),
        "key_ids": torch.arange(200, device="cuda")[::2] // 3,
        "row_weight": torch.rand(160, device="cuda")[::2],
    }
    dense = {name: value.contiguous() for name, value in options.items()}
    for query in (query.expand(80, 40) for query in queries):
        loss = infonce_loss(query, keys, **options)  # type: ignore[arg-type]
        same = infonce_loss(query.contiguous(), keys.contiguous(), **dense)  # type: ignore[arg-type]
        assert torch.equal(loss, same)


@pytest.mark.parametrize("symmetric", [False, True])
def test_kernels_run_on_the_current_stream(symmetric: bool) -> None:
    problem, leaves = on("cuda", problem_of(300, 400, 64, symmetric=symmetric, dtype=torch.float32))
    expected = [loss := infonce_loss(**problem), *torch.autograd.grad(loss, leaves)]
    values = problem["query"].detach().clone()
    with torch.no_grad():
        problem["query"].zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whoever does not wait for it sees zeros
        with torch.no_grad():
            problem["query"].copy_(values)
        results = [loss := infonce_loss(**problem), *torch.autograd.grad(loss, leaves)]
    stream.synchronize()
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_give_the_same_bits(dtype: torch.dtype, symmetric: bool) -> None:
    problem = problem_of(700, 2100, 100, symmetric=symmetric, dtype=dtype)
    first = loss_and_gradients(problem, "cuda")
    for _ in range(5):
        for value, same in zip(loss_and_gradients(problem, "cuda"), first, strict=True):
            assert torch.equal(value, same)


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_waits_for_the_device(symmetric: bool) -> None:
    problem, leaves = on(
        "cuda", problem_of(300, 400, 40, symmetric=symmetric, dtype=torch.bfloat16)
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(infonce_loss(**problem), leaves)
        with torch.no_grad():
            infonce_loss(**(problem | {"temperature": 0.3}))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_linear_in_the_batch(dtype: torch.dtype, symmetric: bool) -> None:
    """The gradients aside; the logits alone would be 1024 MiB."""
    shape = (16384, 128)
    query, keys = (torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    infonce_loss(query, keys, temperature=0.1, symmetric=symmetric).backward()
    num_bytes = torch.cuda.max_memory_allocated() - before
    assert num_bytes - 2 * query.nbytes <= 32 * MIB


BAD_TARGET = """
import torch
from torchrec_pt.ops import infonce_loss

target = torch.tensor([0, 1, {target}], device="cuda")
infonce_loss(torch.ones(3, 8, device="cuda"), torch.ones(5, 8, device="cuda"), target)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("target", [-1, 5, 2**32])
def test_a_target_that_is_no_key_stops_the_process(target: int) -> None:
    command = [sys.executable, "-c", BAD_TARGET.format(target=target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "target[i] >= 0 && target[i] < problem.keys.num" in done.stderr
    assert "device-side assert" in done.stderr
