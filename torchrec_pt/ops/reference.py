"""Every operator once more as its bare formula, in float64 PyTorch that holds everything."""

from __future__ import annotations

import torch
from torch import Tensor


def infonce_logits(
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
    log_q_positive: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """(B, N) float64: s_ij, with -inf where j is not allowed."""
    num_rows, num_keys = query.shape[0], keys.shape[0]
    key_index = torch.arange(num_keys)
    logits = query.double() @ keys.double().T / temperature
    if key_bias is not None:
        logits = logits + key_bias.double()
    negative_logits = logits if log_q is None else logits - log_q.double()

    forbidden = torch.zeros(num_rows, num_keys, dtype=torch.bool)
    if key_ids is not None:
        assert target is not None
        forbidden |= key_ids == key_ids[target][:, None]
    if query_ids is not None:
        forbidden |= (query_ids if key_query_ids is None else key_query_ids) == query_ids[:, None]
    if self_index is not None:
        forbidden |= key_index == self_index[:, None]
    negative_logits = negative_logits.masked_fill(forbidden, -torch.inf)
    if target is None:
        return negative_logits

    if log_q_positive is not None:
        logits = logits - log_q_positive.double()[:, None]
    return torch.where(key_index == target[:, None], logits, negative_logits)


def infonce_loss_rows(
    query: Tensor, keys: Tensor, target: Tensor | None = None, **options: Tensor | float | None
) -> Tensor:
    """(B,) float64: logsumexp_j s_ij − s_it, the losses before weights and reduction."""
    if target is None:
        target = torch.arange(query.shape[0])
    logits = infonce_logits(query, keys, target, **options)  # type: ignore[arg-type]
    return logits.logsumexp(1) - logits.gather(1, target[:, None]).squeeze(1)


# What the columns of the symmetric loss know.
_OF_COLUMNS = ("temperature", "key_ids", "query_ids", "key_query_ids", "self_index")


def infonce_symmetric_rows(
    query: Tensor,
    keys: Tensor,
    *,
    row_weight: Tensor | None = None,
    **options: Tensor | float | None,
) -> Tensor:
    """(B,) float64: the average of both directions' losses; 0 where row_weight is 0."""
    num_rows = query.shape[0]
    is_dead = torch.zeros(num_rows, dtype=torch.bool) if row_weight is None else row_weight == 0
    query = query.masked_fill(is_dead[:, None], 0)
    target = torch.arange(num_rows)
    rows = infonce_loss_rows(query, keys, target, **options)
    of_columns = {name: options[name] for name in _OF_COLUMNS if name in options}
    logits = infonce_logits(query, keys, target, **of_columns)[:, :num_rows]  # type: ignore[arg-type]
    columns = logits.masked_fill(is_dead[:, None], -torch.inf).logsumexp(0) - logits.diagonal()
    return ((rows + columns) / 2).masked_fill(is_dead, 0)


def sampled_softmax_logits(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    log_q_positive: Tensor | None = None,
    log_q_negatives: Tensor | None = None,
) -> Tensor:
    """(B, 1 + M) float64: the positive's logit, then the negatives', -inf where left out."""
    negatives = negatives.expand(query.shape[0], -1)
    ids = torch.cat((positive[:, None], negatives), 1)
    logits = torch.einsum("bd,bjd->bj", query.double(), table.double()[ids]) / temperature
    of_positive, of_negatives = logits[:, :1], logits[:, 1:]
    if log_q_positive is not None:
        of_positive = of_positive - log_q_positive.double()[:, None]
    if log_q_negatives is not None:
        of_negatives = of_negatives - log_q_negatives.double()
    of_negatives = of_negatives.masked_fill(negatives == positive[:, None], -torch.inf)
    return torch.cat((of_positive, of_negatives), 1)


def sampled_softmax_loss_rows(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negatives: Tensor,
    **options: Tensor | float | None,
) -> Tensor:
    """(B,) float64: logsumexp_j s_j − s_0, the losses before weights and reduction."""
    logits = sampled_softmax_logits(query, table, positive, negatives, **options)  # type: ignore[arg-type]
    return logits.logsumexp(1) - logits[:, 0]
