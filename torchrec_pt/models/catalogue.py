"""The whole catalogue as the keys of a softmax, whole on each rank or by ranges of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_pt.distributed import gather_rows, logsumexp_over_ranks, owned_sum_over_ranks
from torchrec_pt.ops.infonce import infonce_logsumexp, infonce_loss


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
        is_mine = gather_rows(torch.full_like(target, dist.get_rank())) == dist.get_rank()
        query, target, row_weight = map(gather_rows, (query, target, row_weight))
        lse = infonce_logsumexp(query, self.keys, temperature=temperature)
        local = target - self.first
        is_held = (local >= 0) & (local < len(self.keys))
        positive_key = self.keys[torch.where(is_held, local, 0)] if len(self.keys) else query * 0
        positive = torch.where(is_held, (query * positive_key).sum(1) / temperature, 0.0)
        loss = row_weight * (logsumexp_over_ranks(lse) - owned_sum_over_ranks(positive))
        # Every rank computed every row; each reports its own and differentiates them all.
        total = loss.sum()
        return total - (total - loss[is_mine].sum()).detach()
