"""Errors of a contestant against the formula in float64, a block of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from infonce_losses import TEMPERATURE, Contestant, Problem
from measuring import relative_error
from torch import Tensor

from torchrec_pt.ops.reference import infonce_loss_rows

BLOCK_ROWS = 512
OF_ROWS = ("query_ids", "self_index", "log_q_positive")


@dataclass(frozen=True)
class Errors:
    """The loss relative to itself, each gradient's largest error to its largest entry."""

    loss: float
    gradient: float | None  # in the worst of the gradients; None of forward alone


def measure_errors(contestant: Contestant, problem: Problem, section: str) -> Errors:
    """Of a contestant of the section."""
    leaves = contestant.leaves(problem)
    right_loss, right_gradients = _reference(leaves, problem, section)
    if section == "forward":
        return Errors(relative_error(contestant.forward(problem), right_loss), None)
    loss = contestant.loss(problem)
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    return Errors(
        relative_error(loss, right_loss),
        max(
            relative_error(gradient, right)
            for gradient, right in zip(gradients, right_gradients, strict=True)
        ),
    )


def _reference(
    leaves: dict[str, Tensor], problem: Problem, section: str
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the leaves; with more leaves than query and keys, of all options."""
    exact = {name: leaf.detach().double().cpu().requires_grad_() for name, leaf in leaves.items()}
    options: dict[str, Any] = {"temperature": TEMPERATURE}
    if len(leaves) > 2:
        options = {name: option.detach().cpu() for name, option in problem.options.items()}
    query, keys = exact["query"], exact["keys"]
    options |= {name: exact[name] for name in exact.keys() - {"query", "keys"}}
    if section == "symmetric":
        loss = _add_gradients(query, keys, options, 2) + _add_gradients(keys, query, options, 2)
    else:
        loss = _add_gradients(query, keys, options, 1)
    return loss, [leaf.grad for leaf in exact.values() if leaf.grad is not None]


def _add_gradients(query: Tensor, keys: Tensor, options: dict[str, Any], parts: int) -> Tensor:
    """Mean loss over the rows, divided by `parts`; its gradients are added to the leaves'."""
    num_rows = query.shape[0]
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(num_rows).split(BLOCK_ROWS):
        of_rows = {name: options[name][rows] for name in OF_ROWS if name in options}
        losses = infonce_loss_rows(query[rows], keys, rows, **(options | of_rows))
        loss = losses.sum() / (num_rows * parts)
        loss.backward()
        total += loss.detach()
    return total
