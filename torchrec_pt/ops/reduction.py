"""What the losses of the operators share once there is a loss for each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]


def check_reduction(
    operator: str, reduction: str, row_weight: Tensor | None, num_rows: int
) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f'{operator}: reduction must be "none", "mean" or "sum", got "{reduction}"'
        )
    if row_weight is not None and row_weight.shape != (num_rows,):
        raise ValueError(
            f"{operator}: row_weight must have shape ({num_rows},), got {tuple(row_weight.shape)}"
        )


def reduce_rows(loss: Tensor, row_weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Of (B,) losses: themselves weighted, their sum, or that over Σ w (0 where Σ w = 0).

    A row of weight 0 counts as 0, whatever it holds.
    """
    if row_weight is not None:
        row_weight = row_weight.to(loss.dtype)
        loss = torch.where(row_weight == 0, 0, loss) * row_weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (max(len(loss), 1) if row_weight is None else total_weight(row_weight))


def total_weight(weight: Tensor) -> Tensor:
    """0-dim, to divide by."""
    total = weight.sum()
    return torch.where(total == 0, 1, total)


def result_dtype(vectors: Tensor) -> torch.dtype:
    """What losses and sums are in."""
    return torch.float64 if vectors.dtype == torch.float64 else torch.float32


# --- no second derivative -----------------------------------------------------------------------


def without_second_derivative(
    operator: str, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients as they are; with create_graph=True each of them refuses its own."""
    if not torch.is_grad_enabled():
        return list(gradients)
    anchor = torch.ones((), requires_grad=True)
    return [
        None if g is None else _NoSecondDerivative.apply(g, anchor, operator) for g in gradients
    ]


def refuse_second_derivative(operator: str) -> NoReturn:
    raise NotImplementedError(f"{operator}: there is no second derivative (double backward)")


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on; `anchor` requires one, so that backward is asked."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor, operator: str) -> Tensor:
        ctx.operator = operator
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        refuse_second_derivative(ctx.operator)
