"""The whole catalogue as the keys of a softmax, whole on each rank or by ranges of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchrec_pt.distributed import gather_rows, logsumexp_over_ranks, owned_sum_over_ranks
from torchrec_pt.ops.infonce import infonce_logsumexp, infonce_loss

SOFTPLUS_BLOCK = 4096  # items whose scores are held at a time


@dataclass(frozen=True)
class Catalogue:
    """Item vectors to score against.

    Attributes:
        keys: (N_r, D) vectors of the items first … first + N_r − 1.
        is_sharded: whether the other ranks hold the other items; else `keys` is everything.
    """

    keys: Tensor
    first: int
    is_sharded: bool

    def softmax_loss(
        self, query: Tensor, target: Tensor, row_weight: Tensor, *, temperature: float | Tensor
    ) -> Tensor:
        """Σ_i row_weight_i · (logsumexp_j s_ij − s_{i, target_i}), s = query · keysᵀ / temperature.

        Args:
            query: (Q, D) of this rank; Q may differ between ranks and may be 0.
            target: (Q,) int64 dense item ids.
            row_weight: (Q,) float32.
        Returns:
            0-dim: the sum over this rank's rows. Its gradient is that of the sum over all ranks.
        """
        if not self.is_sharded:
            return infonce_loss(
                query,
                self.keys,
                target,
                temperature=temperature,
                row_weight=row_weight,
                reduction="sum",
            )
        is_mine = _is_mine(query)
        query, target, row_weight = map(gather_rows, (query, target, row_weight))
        lse = infonce_logsumexp(query, self.keys, temperature=temperature)
        local = target - self.first
        is_held = (local >= 0) & (local < len(self.keys))
        positive_key = self.keys[torch.where(is_held, local, 0)] if len(self.keys) else query * 0
        positive = torch.where(is_held, (query * positive_key).sum(1) / temperature, 0.0)
        loss = row_weight * (logsumexp_over_ranks(lse) - owned_sum_over_ranks(positive))
        return _reported(loss, is_mine)

    # --- sums over all scores of a row -------------------------------------------------------
    # Arguments, value and gradient as of softmax_loss.

    def sum_of_logsumexp(self, query: Tensor, row_weight: Tensor, *, temperature: float) -> Tensor:
        """Σ_i row_weight_i · logsumexp_j s_ij, s = query · keysᵀ / temperature."""

        def partial(query: Tensor) -> Tensor:
            return infonce_logsumexp(query, self.keys, temperature=temperature)

        return self._sum(query, row_weight, partial, logsumexp_over_ranks)

    def sum_of_softplus(self, query: Tensor, row_weight: Tensor) -> Tensor:
        """Σ_i row_weight_i · Σ_j log(1 + exp(query_i · key_j)); scores are made again in backward.

        At most (rows of all ranks) × SOFTPLUS_BLOCK of them are held.
        """

        def partial(query: Tensor) -> Tensor:
            total = query.new_zeros(len(query))
            for keys in self.keys.split(SOFTPLUS_BLOCK):
                total = total + checkpoint(
                    _softplus_of_rows, query, keys, use_reentrant=False, preserve_rng_state=False
                )
            return total

        return self._sum(query, row_weight, partial, owned_sum_over_ranks)

    def sum_of_squares(self, query: Tensor, row_weight: Tensor) -> Tensor:
        """Σ_i row_weight_i · Σ_j (query_i · key_j)², from two D × D matrices, no scores.

        Σ_i w_i q_iᵀ (KᵀK) q_i = ⟨Σ_i w_i q_i q_iᵀ, KᵀK⟩ (Hu et al. 2008, section 4).
        """
        gram = self.keys.T @ self.keys
        outer = (query * row_weight.unsqueeze(1)).T @ query
        if not self.is_sharded:
            return (outer * gram).sum()
        gram = owned_sum_over_ranks(gram)
        total = (owned_sum_over_ranks(outer) * gram).sum()
        return total - (total - (outer * gram).sum()).detach()

    def _sum(
        self,
        query: Tensor,
        row_weight: Tensor,
        partial: Callable[[Tensor], Tensor],
        over_ranks: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """`partial`: (Q, D) -> (Q,) over this rank's keys; `over_ranks` makes one of all ranks'."""
        if not self.is_sharded:
            return (row_weight * partial(query)).sum()
        is_mine = _is_mine(query)
        query, row_weight = gather_rows(query), gather_rows(row_weight)
        return _reported(row_weight * over_ranks(partial(query)), is_mine)


def _is_mine(rows: Tensor) -> Tensor:
    """Which of the gathered rows of all ranks are this rank's `rows`."""
    rank = torch.full((len(rows),), dist.get_rank(), device=rows.device)
    return gather_rows(rank) == dist.get_rank()


def _reported(loss: Tensor, is_mine: Tensor) -> Tensor:
    """Every rank computed every row; each reports its own and differentiates them all."""
    total = loss.sum()
    return total - (total - loss[is_mine].sum()).detach()


def _softplus_of_rows(query: Tensor, keys: Tensor) -> Tensor:
    return F.softplus(query @ keys.T).sum(1)
