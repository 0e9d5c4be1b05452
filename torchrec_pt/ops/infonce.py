"""InfoNCE whose memory is linear in the batch (formula: csrc/infonce/infonce.h)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from torchrec_pt.ops.reduction import (
    Reduction,
    check_reduction,
    reduce_rows,
    refuse_second_derivative,
    result_dtype,
    total_weight,
    without_second_derivative,
)


def infonce_loss(
    query: Tensor,
    keys: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    log_q: Tensor | None = None,
    key_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_query_ids: Tensor | None = None,
    self_index: Tensor | None = None,
    symmetric: bool = False,
    log_q_positive: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of each query's own key among all keys.

    With s_ij = q_i·k_j / τ − log_q_j + key_bias_j the loss of row i is logsumexp over the
    allowed j of s_ij, minus s_it for its target t. The target is always allowed; it takes
    log_q_positive_i in the place of log_q_t. (B, N) logits are never held.

    With `symmetric`, key i belongs to query i, and the loss of the pair is the average of this
    and of the same over column i: −log of exp(q_i·k_i / τ) among the queries r that may see key
    i. The columns know neither log_q, log_q_positive nor key_bias; keys past B are negatives
    of the rows alone.

    Args:
        query: (B, D) float32, bfloat16, float16 or float64.
        keys: (N, D); 16-bit queries against float32 keys are welcome.
        target: (B,) int64 in [0, N); default arange(B); not with symmetric.
        temperature: τ > 0; a 0-dim tensor receives its gradient.
        log_q: (N,) log of each key's expected count as a negative, a constant; +inf removes
            the key as a negative.
        key_ids: (N,) int64; a key with the id of the row's target is no negative.
        query_ids, key_query_ids: (B,) and (N,) int64; a key of the row's own query id is no
            negative. key_query_ids defaults to query_ids where N = B.
        self_index: (B,) int64; this key is no negative. Outside [0, N) it masks nothing.
        symmetric: average the losses of both directions; needs B <= N.
        log_q_positive: (B,) constant; default 0.
        key_bias: (N,), has a gradient.
        row_weight: (B,); a row of weight 0 gives 0 and no gradient, whatever it holds. Its
            query is no negative of a column, its key remains one of the other rows.
        reduction: "none" gives (B,), "sum" Σ w·loss, "mean" that over Σ w (0 where Σ w = 0).
    Returns:
        float32 (float64 for float64 inputs). There is no second derivative.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, a target is outside [0, N), or
            symmetric is given a target.
    """
    num_rows = query.shape[0]
    check_reduction("infonce", reduction, row_weight, num_rows)
    if symmetric and target is not None:
        raise ValueError("infonce: symmetric takes no target, key i belongs to query i; leave it")
    if row_weight is not None:
        row_weight = row_weight.to(result_dtype(query))
    if target is None and not symmetric:
        target = torch.arange(num_rows, device=query.device)
    options = (
        _temperature_tensor(temperature),
        log_q,
        key_ids,
        query_ids,
        _key_query_ids(query, keys, query_ids, key_query_ids),
        self_index,
        log_q_positive,
        key_bias,
    )
    if symmetric:
        loss, *_ = torch.ops.torchrec_pt.infonce_symmetric_forward(
            query, keys, row_weight, *options
        )
    else:
        problem = (query, keys, target, *options)
        if reduction != "none" and _is_worth_summing(problem, row_weight):
            return _sum(problem, row_weight, reduction)
        lse, positive, _, _ = torch.ops.torchrec_pt.infonce_forward(*problem)
        loss = lse - positive
    return reduce_rows(loss, row_weight, reduction)


def _sum(
    problem: tuple[Tensor | None, ...], row_weight: Tensor | None, reduction: Reduction
) -> Tensor:
    """The reduced loss whose gradients are made along with it."""
    query = problem[0]
    assert query is not None
    weight = row_weight
    if weight is None:
        weight = query.new_ones(query.shape[0], dtype=result_dtype(query))
    coefficient = weight / total_weight(weight) if reduction == "mean" else weight
    total, *_ = torch.ops.torchrec_pt.infonce_sum(coefficient, *problem)
    return total


# Above so many keys the rows of one block would not fit beside the rest (csrc/infonce).
_MOST_KEYS_TO_SUM = 131_072


def _is_worth_summing(problem: tuple[Tensor | None, ...], row_weight: Tensor | None) -> bool:
    """Whether to make the gradients along with the loss: three products in place of four."""
    query, keys = problem[:2]
    assert query is not None
    assert keys is not None
    return (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in problem)
        and not (row_weight is not None and row_weight.requires_grad)
        and keys.shape[0] <= _MOST_KEYS_TO_SUM
        and not query.is_cuda
    )


def infonce_logsumexp(
    query: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    log_q: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_query_ids: Tensor | None = None,
    self_index: Tensor | None = None,
) -> Tensor:
    """The (B,) logsumexp over the allowed keys; arguments and errors as in infonce_loss.

    Ranks that each hold a part of the keys merge theirs by logaddexp. A row without an
    allowed key is -inf, with gradient zero.
    """
    lse, _, _, _ = torch.ops.torchrec_pt.infonce_forward(
        query,
        keys,
        None,
        _temperature_tensor(temperature),
        log_q,
        None,
        query_ids,
        _key_query_ids(query, keys, query_ids, key_query_ids),
        self_index,
        None,
        key_bias,
    )
    return lse


def _temperature_tensor(temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature
    return torch.tensor(temperature, dtype=torch.float64)


def _key_query_ids(
    query: Tensor, keys: Tensor, query_ids: Tensor | None, key_query_ids: Tensor | None
) -> Tensor | None:
    if key_query_ids is None and query_ids is not None and query.shape[0] == keys.shape[0]:
        return query_ids
    return key_query_ids


# --- what torch.compile and autograd need -------------------------------------------------------


@torch.library.register_fake("torchrec_pt::infonce_forward")
def _fake_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = query.new_empty((query.shape[0],), dtype=result_dtype(query))
    return row, torch.empty_like(row), torch.empty_like(row), torch.empty_like(row)


@torch.library.register_fake("torchrec_pt::infonce_backward")
def _fake_backward(
    grad_lse: Tensor, grad_positive: Tensor, lse: Tensor, query: Tensor, keys: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    key_bias: Tensor | None = rest[-1]
    grad_bias = (
        lse.new_empty((0,))
        if key_bias is None
        else keys.new_empty((keys.shape[0],), dtype=key_bias.dtype)
    )
    return query.new_empty(query.shape), keys.new_empty(keys.shape), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    lse, _, expected_dot, positive_dot = output
    ctx.mark_non_differentiable(expected_dot, positive_dot)
    ctx.save_for_backward(lse, expected_dot, positive_dot, *inputs)


def _backward(
    ctx: Any, grad_lse: Tensor, grad_positive: Tensor, *_: Any
) -> tuple[Tensor | None, ...]:
    lse, expected_dot, positive_dot, *inputs = ctx.saved_tensors
    grad_query, grad_keys, grad_key_bias = torch.ops.torchrec_pt.infonce_backward(
        grad_lse, grad_positive, lse, *inputs
    )
    temperature, key_bias = inputs[3], inputs[10]
    grad_temperature = None
    if ctx.needs_input_grad[3]:
        # s = q·k / τ + …, so ds/dτ = −q·k / τ². A row without upstream may hold inf.
        row = torch.where(grad_lse == 0, 0, grad_lse * expected_dot)
        row = row + torch.where(grad_positive == 0, 0, grad_positive * positive_dot)
        row = torch.where(lse == -torch.inf, 0, row)
        grad_temperature = (-row.sum() / temperature.to(row.dtype) ** 2).to(temperature)
    return (
        grad_query,
        grad_keys,
        *(None,),  # target
        grad_temperature,
        *(None,) * 6,  # log_q, ids, self_index, log_q_positive
        None if key_bias is None else grad_key_bias,
    )


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    refuse_second_derivative("infonce")


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


torch.library.register_autograd(
    "torchrec_pt::infonce_forward", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "torchrec_pt::infonce_backward", _refuse_double_backward, setup_context=_keep_nothing
)


# --- both directions ----------------------------------------------------------------------------


@torch.library.register_fake("torchrec_pt::infonce_symmetric_forward")
def _fake_symmetric_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_forward(query)


@torch.library.register_fake("torchrec_pt::infonce_symmetric_backward")
def _fake_symmetric_backward(
    grad_loss: Tensor, lse: Tensor, column_lse: Tensor, query: Tensor, keys: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(grad_loss, grad_loss, lse, query, keys, *rest)


def _setup_symmetric_context(
    ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]
) -> None:
    _, lse, column_lse, slope = output
    ctx.mark_non_differentiable(lse, column_lse, slope)
    ctx.save_for_backward(lse, column_lse, slope, *inputs)


def _symmetric_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    lse, column_lse, slope, *inputs = ctx.saved_tensors
    grad_query, grad_keys, grad_key_bias = torch.ops.torchrec_pt.infonce_symmetric_backward(
        grad_loss, lse, column_lse, *inputs
    )
    temperature, key_bias = inputs[3], inputs[10]
    grad_temperature = None
    if ctx.needs_input_grad[3]:
        # The loss of a row without upstream may have an infinite slope.
        grad_temperature = torch.where(grad_loss == 0, 0, grad_loss * slope).sum().to(temperature)
    return (
        grad_query,
        grad_keys,
        *(None,),  # row_weight
        grad_temperature,
        *(None,) * 6,  # log_q, ids, self_index, log_q_positive
        None if key_bias is None else grad_key_bias,
    )


torch.library.register_autograd(
    "torchrec_pt::infonce_symmetric_forward",
    _symmetric_backward,
    setup_context=_setup_symmetric_context,
)
torch.library.register_autograd(
    "torchrec_pt::infonce_symmetric_backward",
    _refuse_double_backward,
    setup_context=_keep_nothing,
)


# --- the weighted sum, whose gradients are made along with it -----------------------------------


@torch.library.register_fake("torchrec_pt::infonce_sum")
def _fake_sum(
    coefficient: Tensor, query: Tensor, keys: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = query.new_empty((), dtype=result_dtype(query))
    num_biases = 0 if rest[-1] is None else keys.shape[0]
    return (
        total,
        total.new_empty(query.shape),
        total.new_empty(keys.shape),
        torch.empty_like(total),
        total.new_empty((num_biases,)),
    )


def _keep_gradients(
    ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]
) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # else zeros of the size of the gradients are made
    ctx.save_for_backward(*gradients)
    _, query, keys, _, temperature, *_, key_bias = inputs
    ctx.kinds = [
        None if tensor is None else (tensor.dtype, tensor.device)
        for tensor in (query, keys, temperature, key_bias)
    ]


def _scale_gradients(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # In 16 bits only after the scale: a GradScaler's keeps small gradients from vanishing.
    scaled = [
        None if kind is None else (grad_total * gradient).to(dtype=kind[0], device=kind[1])
        for gradient, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)
    ]
    query, keys, temperature, key_bias = without_second_derivative("infonce", scaled)
    return (None, query, keys, None, temperature, *(None,) * 6, key_bias)


torch.library.register_autograd(
    "torchrec_pt::infonce_sum", _scale_gradients, setup_context=_keep_gradients
)
