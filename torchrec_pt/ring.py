"""InfoNCE over the keys of all ranks that go round a ring (the loss: global_negatives).

While a block of keys is computed, the next one is on its way (Liu et al. 2023, Ring Attention;
Cheng et al. 2024, Inf-CL). The logsumexps of the blocks are merged by logaddexp. Backward sends the
keys round once more, and with each block the sum of its gradients so far, which ends at home.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

import torchrec_pt.ops  # noqa: F401 - registers the operators
from torchrec_pt.distributed import start_ring_exchange
from torchrec_pt.global_negatives import (
    Keys,
    Reduction,
    check_options,
    count_keys,
    target_or_default,
)


def ring_infonce_loss(
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
    """The loss of this rank's rows, by keys that go round; arguments and errors as in AcrossRanks.

    Beside the caller's own keys at most two other ranks' are held, and in backward two blocks of
    gradients, in float32. Every key travels W − 1 steps forward, and again W − 1 in backward,
    where its gradient travels W, home.
    """
    check_options(keys, query_ids, reduction)
    if row_weight is not None and row_weight.shape != (len(query),):
        raise ValueError(
            f"global_negatives: row_weight must have shape ({len(query)},), "
            f"got {tuple(row_weight.shape)}"
        )
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float64)
    ring = _Ring(
        counts=count_keys(keys),
        target=target_or_default(target, query),
        own_ids=keys.ids,
        query_ids=query_ids,
        self_index=self_index,
        log_q_positive=log_q_positive,
    )
    log_q = query.new_zeros(len(keys.vectors)) if keys.log_q is None else keys.log_q
    constants = keys._replace(vectors=keys.vectors.detach(), log_q=log_q, key_bias=None)
    loss: Tensor = _RingInfonce.apply(
        query, keys.vectors, keys.key_bias, temperature, constants, ring
    )
    if row_weight is not None:
        loss = torch.where(row_weight == 0, 0, loss) * row_weight.to(loss.dtype)
    return loss.sum() if reduction == "sum" else loss


# A log_q_positive that leaves a logit without weight, yet finite: exp(−1e30 − lse) = 0.
_WEIGHTLESS = 1e30

_Arguments = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class _Ring:
    """What stays at home while the keys travel. `counts` are the keys of each rank."""

    counts: list[int]
    target: Tensor
    own_ids: Tensor | None
    query_ids: Tensor | None
    self_index: Tensor | None
    log_q_positive: Tensor | None

    def blocks(self, keys: Keys) -> Iterator[tuple[int, Keys]]:
        """(owner, its keys) of every rank, from this one backwards; the next is on its way.

        Another rank's block ends with one key more, of zeros, that log_q removes; and it lasts
        until the next one is asked for.
        """
        num_ranks = len(self.counts)
        longest = max(self.counts) + 1
        buffers = [
            keys.each(lambda field: field.new_empty((longest, *field.shape[1:])))
            for _ in range(min(num_ranks - 1, 2))
        ]
        block, owner = keys.each(Tensor.contiguous), dist.get_rank()
        for step in range(num_ranks - 1):
            source = (owner - 1) % num_ranks
            arriving = buffers[step % 2].head(self.counts[source] + 1)
            works = start_ring_exchange(
                block.head(self.counts[owner]).given, arriving.head(self.counts[source]).given
            )
            arriving.each(lambda field: field[-1].zero_())
            assert arriving.log_q is not None
            arriving.log_q[-1] = torch.inf
            yield owner, block
            for work in works:
                work.wait()
            block, owner = arriving, source
        yield owner, block

    def pass_on(self, gradients: list[Tensor], owner: int) -> list[Tensor]:
        """The gradients of the block of `owner` go to the next rank; those of the next arrive."""
        if len(self.counts) == 1:
            return gradients
        count = self.counts[(owner - 1) % len(self.counts)]
        received = [gradient.new_empty((count, *gradient.shape[1:])) for gradient in gradients]
        for work in start_ring_exchange(gradients, received):
            work.wait()
        return received

    def arguments(self, query: Tensor, temperature: Tensor, owner: int, block: Keys) -> _Arguments:
        """Of the operator infonce_forward, for the keys of one rank.

        The operator knows a row's target id by a target among the keys. In another rank's block
        any key with that id stands in for it, or else the key of zeros at the end: it is masked
        with the others of its id, and comes back as a positive without weight.
        """
        target, key_ids, log_q_positive = self.target, block.ids, self.log_q_positive
        if owner != dist.get_rank():
            log_q_positive = query.new_full((len(query),), _WEIGHTLESS, dtype=torch.float64)
            if block.ids is None or self.own_ids is None:
                target = torch.full_like(target, self.counts[owner])
            else:
                target, key_ids = _stand_ins(block.ids, self.own_ids[target])
        self_index = self.self_index
        if self_index is not None:
            self_index = self_index - sum(self.counts[:owner])
        return (
            query,
            block.vectors,
            target,
            temperature,
            block.log_q,
            key_ids,
            self.query_ids,
            block.query_ids,
            self_index,
            log_q_positive,
            block.key_bias,
        )


def _stand_ins(ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each target id the place of a key with it, else the last place; and ids to mask by.

    Args:
        ids: (N + 1,) int64, the last one without meaning.
        target_ids: (B,) int64.
    Returns:
        (B,) int64 in [0, N], and (N + 1,) int64 that are equal where the first N ids are, the
        last being unlike all others.
    """
    ordered, order = ids.sort(stable=True)  # so that the last key comes after others of its id
    place = torch.searchsorted(ordered, target_ids).clamp(max=len(ids) - 1)
    last = len(ids) - 1
    stand_in = torch.where(ordered[place] == target_ids, order[place], last)
    label = torch.searchsorted(ordered, ids)
    label[last] = len(ids)
    return stand_in, label


class _RingInfonce(torch.autograd.Function):
    """(B,) losses of this rank's rows."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        vectors: Tensor,
        key_bias: Tensor | None,
        temperature: Tensor,
        constants: Keys,
        ring: _Ring,
    ) -> Tensor:
        keys = constants._replace(vectors=vectors, key_bias=key_bias)
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_full((len(query),), -torch.inf, dtype=dtype)
        dot = torch.zeros_like(lse)
        for owner, block in ring.blocks(keys):
            block_lse, positive, block_dot, positive_dot = torch.ops.torchrec_pt.infonce_forward(
                *ring.arguments(query, temperature, owner, block)
            )
            merged = torch.logaddexp(lse, block_lse)
            dot = dot * torch.exp(lse - merged) + block_dot * torch.exp(block_lse - merged)
            lse = merged
            if owner == dist.get_rank():
                own_positive, own_dot = positive, positive_dot
        # s = q·k / τ + …, so ds/dτ = −q·k / τ².
        slope = (own_dot - dot) / temperature.to(dtype) ** 2
        ctx.save_for_backward(lse, slope, query, vectors, key_bias, temperature)
        ctx.constants, ctx.ring = constants, ring
        return lse - own_positive

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _RingGradients.apply(grad_loss, *ctx.saved_tensors, ctx.constants, ctx.ring)
        return (*gradients, None, None)


class _RingGradients(torch.autograd.Function):
    """The gradients of query, vectors, key_bias and temperature; refuses one of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_loss: Tensor,
        lse: Tensor,
        slope: Tensor,
        query: Tensor,
        vectors: Tensor,
        key_bias: Tensor | None,
        temperature: Tensor,
        constants: Keys,
        ring: _Ring,
    ) -> tuple[Tensor | None, ...]:
        keys = constants._replace(vectors=vectors, key_bias=key_bias)
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        travelling: list[Tensor] = []
        for owner, block in ring.blocks(keys):
            is_own = owner == dist.get_rank()
            upstream = (grad_loss, -grad_loss if is_own else torch.zeros_like(grad_loss), lse)
            arguments = ring.arguments(query, temperature, owner, block)
            count = ring.counts[owner]
            share = _block_gradients(upstream, arguments, grad_query, count)
            travelling = _added(travelling, share)
            del share  # or three blocks of gradients would be held
            travelling = ring.pass_on(travelling, owner)
        # A row without upstream may hold inf.
        grad_temperature = torch.where(grad_loss == 0, 0, grad_loss * slope).sum()
        return (
            grad_query.to(query.dtype),
            travelling[0].to(vectors.dtype),
            None if key_bias is None else travelling[1].to(key_bias.dtype),
            grad_temperature.to(temperature),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError("infonce: there is no second derivative (double backward)")


def _block_gradients(
    upstream: tuple[Tensor, ...], arguments: _Arguments, grad_query: Tensor, count: int
) -> list[Tensor]:
    """Of the first `count` keys and, where there is one, their bias; adds those of the query."""
    share, *of_keys = torch.ops.torchrec_pt.infonce_backward(*upstream, *arguments)
    grad_query += share
    if arguments[-1] is None:
        of_keys = of_keys[:1]
    return [gradient[:count].to(grad_query.dtype) for gradient in of_keys]


def _added(sums: list[Tensor], shares: list[Tensor]) -> list[Tensor]:
    """sums += shares; no sums yet are zeros."""
    if not sums:
        return shares
    return [total.add_(share) for total, share in zip(sums, shares, strict=True)]
