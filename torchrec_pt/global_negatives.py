"""InfoNCE whose negatives are the keys of all ranks; here gathered, in `ring` passed round.

With the own keys of every rank behind one another in rank order, this is the loss of
csrc/infonce/infonce.h over all of them, for the queries of this rank:

  loss_i = log Σ_r exp(lse_ir) − s_it        lse_ir: logsumexp over the allowed keys of rank r

`gathered_infonce_loss` holds the keys of all ranks, `ring.ring_infonce_loss` those of two at a
time. Both take and give the same; every rank makes the same call, and the same backward, even if
it has no row. As in `distributed`, a rank's gradients are those of the SUM over the rows of all
ranks: of query and temperature the part of its own rows, of its keys everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_pt import rng
from torchrec_pt.distributed import gather_integers, gather_rows
from torchrec_pt.ops.infonce import infonce_loss

Reduction = Literal["none", "sum"]


class Keys(NamedTuple):
    """Keys with what travels with them.

    Attributes:
        vectors: (N, D) float32, bfloat16, float16 or float64; N differs between ranks, may be 0.
        ids: (N,) int64; a key with the id of the row's target is no negative.
        log_q: (N,) log of each key's expected count as a negative; +inf removes it as one.
        query_ids: (N,) int64; a key of the row's own query id is no negative.
        key_bias: (N,), added to the logits; has a gradient.
    """

    vectors: Tensor
    ids: Tensor | None = None
    log_q: Tensor | None = None
    query_ids: Tensor | None = None
    key_bias: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Keys:
        return Keys._make(None if field is None else change(field) for field in self)

    def head(self, num: int) -> Keys:
        """The first `num` of them."""
        return self.each(lambda field: field[:num])

    @property
    def given(self) -> list[Tensor]:
        return [field for field in self if field is not None]


class AcrossRanks(Protocol):
    """The face of both losses.

    Args:
        query: (B, D) of this rank; B differs between ranks, may be 0.
        keys: of this rank; the same fields, dtypes and D on every rank.
        target: (B,) int64, the row of each query's positive among this rank's own keys;
            default arange(B).
        temperature: τ > 0, the same on every rank; a 0-dim tensor receives its gradient.
        query_ids: (B,) int64, together with keys.query_ids.
        self_index: (B,) int64, counted over the keys of all ranks; this key is no negative.
        log_q_positive: (B,), takes the place of the positive's log_q; default 0.
        row_weight: (B,); a row of weight 0 gives 0 and no gradient, whatever it holds.
        reduction: "none" gives (B,), "sum" Σ w·loss over this rank's rows.
    Returns:
        float32 (float64 for float64 inputs). There is no second derivative.
    Raises:
        ValueError: shapes or dtypes do not fit, keys differ in kind between ranks (on every
            rank), or a target is not among this rank's keys.
    """

    def __call__(
        self,
        query: Tensor,
        keys: Keys,
        target: Tensor | None = None,
        *,
        temperature: float | Tensor,
        query_ids: Tensor | None = None,
        self_index: Tensor | None = None,
        log_q_positive: Tensor | None = None,
        row_weight: Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> Tensor: ...


# --- gathered -----------------------------------------------------------------------------------


def gather_keys(keys: Keys) -> tuple[Keys, int]:
    """The keys of all ranks in rank order, and where this rank's begin among them.

    The gradient of a key sums over the ranks that used it (a reduce-scatter).

    Raises:
        ValueError: on every rank, where the ranks' keys differ in dimension, dtypes or fields;
            on this one, where a field is not (N,).
    """
    counts = count_keys(keys)
    first = sum(counts[: dist.get_rank()])
    return keys.each(lambda field: gather_rows(field, counts)), first


def gathered_infonce_loss(
    query: Tensor,
    keys: Keys,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor,
    query_ids: Tensor | None = None,
    self_index: Tensor | None = None,
    log_q_positive: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """The loss of this rank's rows by `gather_keys`; arguments and errors as in AcrossRanks."""
    check_options(keys, query_ids, reduction)
    everyone, first = gather_keys(keys)
    return infonce_loss(
        query,
        everyone.vectors,
        first + target_or_default(target, query),
        temperature=temperature,
        log_q=everyone.log_q,
        key_ids=everyone.ids,
        query_ids=query_ids,
        key_query_ids=everyone.query_ids,
        self_index=self_index,
        log_q_positive=log_q_positive,
        key_bias=everyone.key_bias,
        row_weight=row_weight,
        reduction=reduction,
    )


def check_options(keys: Keys, query_ids: Tensor | None, reduction: str) -> None:
    if (query_ids is None) != (keys.query_ids is None):
        raise ValueError("global_negatives: query_ids and keys.query_ids go together")
    if reduction not in ("none", "sum"):
        raise ValueError(f'global_negatives: reduction must be "none" or "sum", got "{reduction}"')


def target_or_default(target: Tensor | None, query: Tensor) -> Tensor:
    return torch.arange(len(query), device=query.device) if target is None else target


def count_keys(keys: Keys) -> list[int]:
    """Keys of each rank."""
    if keys.vectors.dim() != 2:
        raise ValueError(
            f"global_negatives: keys.vectors must be (N, D), got {tuple(keys.vectors.shape)}"
        )
    num, dim = keys.vectors.shape
    for name, field in zip(Keys._fields[1:], keys[1:], strict=True):
        if field is not None and field.shape != (num,):
            raise ValueError(
                f"global_negatives: keys.{name} must have shape ({num},), got {tuple(field.shape)}"
            )
    dtypes = {name: str(f.dtype) for name, f in keys._asdict().items() if f is not None}
    kind = f"D = {dim}, {dtypes}"
    gathered = gather_integers([num, rng.key(kind)], keys.vectors.device)
    if any(other != gathered[0][1] for _, other in gathered):
        raise ValueError(
            "global_negatives: the keys of all ranks must agree in D, fields and dtypes; "
            f"rank {dist.get_rank()} gives {kind}"
        )
    return [count for count, _ in gathered]


# --- both directions ----------------------------------------------------------------------------


def symmetric_infonce_loss(
    loss: AcrossRanks,
    query: Tensor,
    keys: Keys,
    *,
    temperature: float | Tensor,
    query_ids: Tensor | None = None,
    log_q_positive: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """Mean of the losses query → keys and keys → query (csrc/infonce/infonce.h), as two calls.

    The columns are the keys of the B pairs alone; they know neither log_q, log_q_positive nor
    key_bias, and a query of weight 0 is no negative of theirs.

    Args:
        loss: gathered_infonce_loss or ring_infonce_loss.
        The others as in AcrossRanks; key i belongs to query i, keys past B are negatives of the
        rows alone.
    """
    rows = loss(
        query,
        keys,
        temperature=temperature,
        query_ids=query_ids,
        log_q_positive=log_q_positive,
        row_weight=row_weight,
        reduction=reduction,
    )
    paired, removed = keys.head(len(query)), None
    if row_weight is not None:
        removed = torch.where(row_weight == 0, torch.inf, 0.0)
        query = query.masked_fill((row_weight == 0)[:, None], 0)  # whatever it holds
    columns = loss(
        paired.vectors,
        Keys(query, ids=paired.ids, log_q=removed, query_ids=query_ids),
        temperature=temperature,
        query_ids=paired.query_ids,
        row_weight=row_weight,
        reduction=reduction,
    )
    return (rows + columns) / 2
