"""What is true of infonce on CUDA alone; test_operators.py runs it in the executor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_infonce import make
from torchrec_pt.ops import infonce_loss
from torchrec_pt.ops.reference import infonce_loss_rows


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def errors(problem: dict[str, Any]) -> list[float]:
    """Of the losses, absolute, and of each gradient, relative to its largest entry."""
    leaves = [problem[name].requires_grad_() for name in ("query", "keys")]
    ours, exact = infonce_loss(**problem, reduction="none"), infonce_loss_rows(**problem)
    found = [(ours - exact).abs().max().item()]
    grads = [torch.autograd.grad(loss.sum(), leaves) for loss in (ours, exact)]

    def relative(grad: Tensor, expected: Tensor) -> float:
        return ((grad - expected).abs().max() / expected.abs().max()).item()

    return [*found, *map(relative, *grads)]


@pytest.mark.parametrize("dim", [40, 128])
def test_float32_follows_the_matmul_precision_of_torch(precision: None, dim: int) -> None:
    problem = make(70, 90, dim)
    problem["query"] /= dim**0.5  # logits of about 1
    torch.set_float32_matmul_precision("highest")
    assert all(error < 2e-6 for error in errors(problem))
    torch.set_float32_matmul_precision("high")
    # tf32 keeps 11 bits of a factor: 5e-4 of each product, of which some average out.
    assert all(1e-5 < error < 5e-3 for error in errors(problem))


def test_mixed_types_are_multiplied_as_float32() -> None:
    problem = make(70, 90, 32)
    problem["query"] = problem["query"].bfloat16()
    wide = problem | {"query": problem["query"].float()}
    assert torch.equal(infonce_loss(**problem), infonce_loss(**wide))


def test_refuses_what_only_the_cpu_has() -> None:
    with pytest.raises(ValueError, match="float64 runs on the CPU alone"):
        infonce_loss(torch.ones(3, 8).double(), torch.ones(5, 8).double())
    with pytest.raises(ValueError, match="D may be at most 256, got 257"):
        infonce_loss(torch.ones(3, 257), torch.ones(5, 257))


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_that_is_no_key_stops_the_kernel(target: int) -> None:
    with pytest.raises(RuntimeError, match="trap"):
        infonce_loss(torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 1, target]))
