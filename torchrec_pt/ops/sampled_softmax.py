"""Softmax over sampled negatives, whose rows are never gathered (csrc/sampled_softmax)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.ops.infonce import infonce_logsumexp
from torchrec_pt.ops.reduction import (
    Reduction,
    check_reduction,
    reduce_rows,
    result_dtype,
    without_second_derivative,
)

_ops = torch.ops.torchrec_pt


def sampled_softmax_loss(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    log_q_positive: Tensor | None = None,
    log_q_negatives: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    sparse: bool = True,
) -> Tensor:
    """Cross-entropy of each query's positive among sampled negatives, rows of one table.

    With s_0 = q·t[positive] / τ − log_q_positive and s_m = q·t[negative_m] / τ − log_q_m the
    loss of a row is logsumexp(s_0, s_1, …) − s_0. A negative that is the row's positive is left
    out; one that occurs twice counts twice. (B, M, D) vectors are never held.

    Args:
        query: (B, D) float32, bfloat16, float16 or float64.
        table: (V, D); 16-bit tables with float32 queries are welcome, and never copied.
        positive: (B,) int64 in [0, V).
        negatives: (B, M) int64 in [0, V), or (M,) for all rows.
        temperature: τ > 0; a 0-dim tensor receives its gradient.
        log_q_positive: (B,) constant; default 0.
        log_q_negatives: the shape of negatives, also by expand; the log of each negative's
            expected count, a constant. +inf removes the negative.
        row_weight: (B,); a row of weight 0 gives 0 and no gradient, whatever it holds.
        reduction: "none" gives (B,), "sum" Σ w·loss, "mean" that over Σ w (0 where Σ w = 0).
        sparse: the gradient of the table is a coalesced sparse tensor with a row for each id
            that positive and negatives name, zeros among them (where `.backward()` keeps it in
            table.grad, torch drops the mark that it is coalesced); else it is dense, as a
            table that is not a leaf needs, and shared negatives in torch.compile.
    Returns:
        float32 (float64 for float64 inputs). There is no second derivative.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, an id is outside [0, V), or the table is
            no leaf and sparse is asked. On CUDA D ends at 1024 (256 where negatives are shared)
            and B (M + 1) below 2^31; in backward on the CPU, V and B (M + 1) below 2^32.
    """
    check_reduction("sampled_softmax", reduction, row_weight, query.shape[0])
    if sparse and table.requires_grad and not table.is_leaf:
        raise ValueError(
            "sampled_softmax: a table that is computed takes a dense gradient; pass sparse=False"
        )
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float64)
    problem = (query, table, positive, negatives, temperature, log_q_positive, log_q_negatives)
    if negatives.dim() == 1:
        _ops.sampled_softmax_check_shared(*problem)
        loss = _shared_loss(*problem, row_weight, sparse)
    else:
        with_gradients = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (query, table, temperature)
        )
        loss, _, _ = _ops.sampled_softmax_forward(*problem, with_gradients, sparse)
    return reduce_rows(loss, row_weight, reduction)


# --- negatives that all rows share --------------------------------------------------------------


def _shared_loss(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    log_q_positive: Tensor | None,
    log_q_negatives: Tensor | None,
    row_weight: Tensor | None,
    sparse: bool,
) -> Tensor:
    """The loss by infonce, whose keys are the few rows of the table that are named."""
    ids, places = torch.cat((positive, negatives)).unique(return_inverse=True)
    rows = _Rows.apply(table, ids, sparse)
    of_positive, of_negatives = places.split([len(positive), len(negatives)])
    query, own_key, keys = (
        query.to(rows.dtype),
        F.embedding(of_positive, rows),
        F.embedding(of_negatives, rows),
    )
    if row_weight is not None:  # what a row of weight 0 holds may be no number
        is_dead = (row_weight == 0)[:, None]
        query, own_key = query.masked_fill(is_dead, 0), own_key.masked_fill(is_dead, 0)
    if log_q_negatives is not None:  # as may what is removed
        keys = keys.masked_fill((log_q_negatives == torch.inf)[:, None], 0)
    lse = infonce_logsumexp(
        query,
        keys,
        temperature=temperature,
        log_q=log_q_negatives,
        query_ids=positive,
        key_query_ids=negatives,
    )
    logit = (query * own_key).sum(1) / temperature
    if log_q_positive is not None:
        logit = logit - log_q_positive.to(logit.dtype)
    return -F.logsigmoid(logit - lse)


class _Rows(torch.autograd.Function):
    """table[ids] for ascending ids, in float32 or wider: their gradient is rounded once."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.sparse = table.shape, table.dtype, sparse
        return table.index_select(0, ids).to(result_dtype(table))

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        grad_rows = grad_rows.to(ctx.dtype)
        if ctx.sparse:
            return _sparse_rows(ids, grad_rows, ctx.shape), None, None
        return grad_rows.new_zeros(ctx.shape).index_copy(0, ids, grad_rows), None, None


def _sparse_rows(ids: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(
        ids[None], rows, shape, is_coalesced=True, check_invariants=False
    )


# --- what torch.compile and autograd need -------------------------------------------------------


@torch.library.register_fake("torchrec_pt::sampled_softmax_check_shared")
def _fake_check_shared(*_: Any) -> None:
    pass


@torch.library.register_fake("torchrec_pt::sampled_softmax_forward")
def _fake_forward(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    log_q_positive: Tensor | None,
    log_q_negatives: Tensor | None,
    with_gradients: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = query.new_empty((query.shape[0],), dtype=result_dtype(query))
    if not with_gradients:
        return loss, loss.new_empty((0,)), loss.new_empty((0,))
    return loss, loss.new_empty(negatives.shape), loss.new_empty(query.shape)


@torch.library.register_fake("torchrec_pt::sampled_softmax_backward_sparse")
def _fake_backward_sparse(
    grad_loss: Tensor,
    loss: Tensor,
    p: Tensor,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    num_items: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    num_ids = torch.library.get_ctx().new_dynamic_size()
    return positive.new_empty((num_ids,)), query.new_empty((num_ids, query.shape[1]), dtype=dtype)


@torch.library.register_fake("torchrec_pt::sampled_softmax_backward_dense")
def _fake_backward_dense(
    grad_loss: Tensor,
    loss: Tensor,
    p: Tensor,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    num_items: int,
    dtype: torch.dtype,
) -> Tensor:
    return query.new_empty((num_items, query.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, table, positive, negatives, temperature, _, _, _, ctx.sparse = inputs
    loss, p, direction = output
    ctx.mark_non_differentiable(p, direction)
    ctx.set_materialize_grads(False)  # else zeros of the size of p are made
    ctx.save_for_backward(loss, p, direction, query, positive, negatives, temperature)
    ctx.table_shape, ctx.table_dtype = table.shape, table.dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 9
    with torch.no_grad():
        gradients = _gradients(ctx, grad_loss)
    of_query, of_table, of_temperature = without_second_derivative("sampled_softmax", gradients)
    return (of_query, of_table, None, None, of_temperature, *(None,) * 4)


def _gradients(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """Of query, table and temperature; 0 for a row without upstream, whatever it holds."""
    loss, p, direction, query, positive, negatives, temperature = ctx.saved_tensors
    of_query = of_table = of_temperature = None
    if ctx.needs_input_grad[0]:
        of_query = (grad_loss / temperature)[:, None] * direction
        of_query = torch.where(grad_loss[:, None] == 0, 0, of_query).to(query.dtype)
    if ctx.needs_input_grad[1]:
        upstream = (grad_loss, loss, p, query, positive, negatives, temperature)
        of = (ctx.table_shape[0], ctx.table_dtype)
        if ctx.sparse:
            ids, rows = _ops.sampled_softmax_backward_sparse(*upstream, *of)
            of_table = _sparse_rows(ids, rows, ctx.table_shape)
        else:
            of_table = _ops.sampled_softmax_backward_dense(*upstream, *of)
    if ctx.needs_input_grad[4]:
        slope = -(query * direction).sum(1) / temperature**2
        of_temperature = torch.where(grad_loss == 0, 0, grad_loss * slope).sum().to(temperature)
    return [of_query, of_table, of_temperature]


torch.library.register_autograd(
    "torchrec_pt::sampled_softmax_forward", _backward, setup_context=_setup_context
)
