"""sampled_softmax on a real GPU: the numbers of the CPU, and what only a GPU can show."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_sampled_softmax import all_options, make, of_one_size, shared, with_leaves
from torchrec_pt.ops import sampled_softmax_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

Problem = dict[str, Any]

DIMS = [1, 8, 31, 32, 64, 100, 128, 256, 1024]
# Largest errors beside the CPU's: of a loss, absolute, and of a gradient, relative to its largest
# entry. 16 bits round the table's gradient alone.
BOUNDS = {
    torch.float32: (2e-5, 2e-4),
    torch.bfloat16: (2e-5, 2.0**-7),
    torch.float16: (2e-5, 2.0**-10),
}
MIB = 2**20


def problem_of(
    num_rows: int, num_negatives: int, dim: int, dtype: torch.dtype = torch.float32
) -> Problem:
    """Every option at once; logits of about one size at every dim."""
    problem = of_one_size(make(num_rows, num_negatives, 500, dim), dtype)
    problem |= all_options(num_rows, num_negatives)
    return problem | {"row_weight": torch.linspace(0, 2, num_rows)}


def on(device: str, problem: Problem) -> Problem:
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in problem.items()}


def loss_and_gradients(problem: Problem, *, sparse: bool = True) -> list[Tensor]:
    """The losses of the rows; then the gradients under an arbitrary upstream."""
    problem, leaves = with_leaves(problem)
    loss = sampled_softmax_loss(**problem, reduction="none", sparse=sparse)
    upstream = torch.linspace(-1, 2, len(loss), device=loss.device)
    grads = torch.autograd.grad((loss * upstream).sum(), leaves)
    return [loss.detach(), *(grad.to_dense() for grad in grads)]


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_numbers_are_those_of_the_cpu(
    dtype: torch.dtype, dim: int, sparse: bool, of: Callable[[Problem], Problem]
) -> None:
    if of is shared and dim > 256:
        pytest.skip("infonce's D ends at 256 on CUDA")
    problem = of(problem_of(70, 130, dim, dtype))
    loss, *grads = loss_and_gradients(on("cuda", problem), sparse=sparse)
    expected_loss, *expected_grads = loss_and_gradients(problem, sparse=sparse)
    loss_bound, gradient_bound = BOUNDS[dtype]
    scale = 1 + expected_loss.abs().max()
    assert (loss.cpu() - expected_loss).abs().max() <= loss_bound * scale
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.is_cuda
        largest = max(expected.abs().max().item(), 1e-3)
        error = (grad.cpu().float() - expected.float()).abs().max().item()
        assert error <= gradient_bound * largest


@pytest.mark.parametrize("num_negatives", [1, 63, 1000])
def test_an_item_in_many_chunks_of_pairs_gets_the_sum(num_negatives: int) -> None:
    problem = problem_of(300, num_negatives, 64)
    problem["negatives"] = problem["negatives"] % 3
    _, *grads = loss_and_gradients(on("cuda", problem))
    _, *expected = loss_and_gradients(problem)
    for grad, value in zip(grads, expected, strict=True):
        torch.testing.assert_close(
            grad.cpu(), value, rtol=1e-3, atol=1e-4 * value.abs().max().item()
        )


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_repeated_runs_give_the_same_bits(dtype: torch.dtype, sparse: bool) -> None:
    problem = on("cuda", problem_of(700, 300, 100, dtype))
    first = loss_and_gradients(problem, sparse=sparse)
    for _ in range(5):
        again = loss_and_gradients(problem, sparse=sparse)
        assert all(map(torch.equal, first, again))


def test_the_dense_gradient_waits_for_nothing() -> None:
    problem, leaves = with_leaves(on("cuda", problem_of(300, 200, 64)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(sampled_softmax_loss(**problem, sparse=False), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_run_on_the_current_stream() -> None:
    problem, leaves = with_leaves(on("cuda", problem_of(300, 200, 64)))
    expected = [loss := sampled_softmax_loss(**problem), *torch.autograd.grad(loss, leaves)]
    values = problem["query"].detach().clone()
    with torch.no_grad():
        problem["query"].zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whoever does not wait for it sees zeros
        with torch.no_grad():
            problem["query"].copy_(values)
        results = [loss := sampled_softmax_loss(**problem), *torch.autograd.grad(loss, leaves)]
    stream.synchronize()
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result.to_dense(), value.to_dense())


def test_the_gathered_rows_are_never_held() -> None:
    """(B, M, D) alone would be 512 MiB."""
    problem, leaves = with_leaves(on("cuda", make(4096, 512, 100_000, 64)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(sampled_softmax_loss(**problem), leaves)
    grown = torch.cuda.max_memory_allocated() - before
    # The sort of 2 M pairs takes most: ids and numbers, in and out, and its own space.
    assert grown - sum(grad.to_dense().nbytes for grad in grads) <= 200 * MIB


BAD = """
import torch
from torchrec_pt.ops import sampled_softmax_loss

ids = dict(positive=torch.tensor([0, 1]), negatives=torch.tensor([[0, 1], [2, 3]]))
ids[{name!r}].view(-1)[1] = {id}
ids = {{name: tensor.cuda() for name, tensor in ids.items()}}
sampled_softmax_loss(torch.ones(2, 8).cuda(), torch.ones(5, 8).cuda(), **ids)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("name", ["positive", "negatives"])
@pytest.mark.parametrize("id", [-1, 5, 2**32])
def test_an_id_that_is_no_row_stops_the_process(name: str, id: int) -> None:
    command = [sys.executable, "-c", BAD.format(name=name, id=id)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "problem.num_items" in done.stderr
    assert "device-side assert" in done.stderr
