"""Errors of a contestant of bench_sampled_softmax.py against the formula in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

from measuring import relative_error
from sampled_softmax_losses import Contestant, Problem, eager
from torch import Tensor


@dataclass(frozen=True)
class Errors:
    """The loss relative to itself, each gradient's largest error to its largest entry."""

    loss: float
    query: float
    table: float


def measure_errors(contestant: Contestant, problem: Problem) -> Errors:
    found = contestant.loss_and_gradients(problem)
    right = Contestant(eager).loss_and_gradients(_exact(problem))
    errors = (relative_error(_dense(f), r) for f, r in zip(found, right, strict=True))
    return Errors(*errors)


def _exact(problem: Problem) -> Problem:
    """The same numbers in float64, on the CPU, with a dense gradient."""
    return replace(
        problem,
        query=problem.query.detach().double().cpu().requires_grad_(),
        table=problem.table.detach().double().cpu().requires_grad_(),
        positive=problem.positive.cpu(),
        negatives=problem.negatives.cpu(),
        log_q=problem.log_q.double().cpu(),
        is_sparse=False,
    )


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor
