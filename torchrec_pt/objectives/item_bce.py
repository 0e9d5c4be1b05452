"""Binary cross-entropy of the right item and of sampled ones, each by itself.

With s the scores over the temperature, s_0 of the right item and s_1 … s_M of its negatives, the
loss of a prediction is

    −(β log σ(s_0) + Σ_m log σ(−s_m)) / (1 + M)

bce: β = 1 (Kang and McAuley 2018, SASRec, section III-E, which sums where gSASRec's code averages:
with SASRec's one negative this is half of its loss).
gbce: β = α (t (1 − 1/α) + 1/α), where α = M / (num_items − 1) is the part of the other items that
is drawn (Petrov and Macdonald 2023, gSASRec, section 5). Negatives that are too few make σ(s_0) too
large; t = 1 takes that back, t = 0 is bce.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.config import PredictionNegatives
from torchrec_pt.objectives.item_softmax import SampledItems

BLOCK = 2**20  # elements of the rows gathered at once: 4 MB as float32


class SampledBce(SampledItems):
    """Negatives are taken as they are drawn: no log_q corrects for how often one is expected.

    A negative that is the right item counts 0, and stays in M. Other items of the user may be
    negatives, as in gSASRec's code; SASRec draws none of them.

    Args:
        calibration: t; 0 is bce.
    Raises:
        ValueError: calibration is asked with more negatives than there are other items, or more
            distinct negatives than there are items.
    """

    def __init__(
        self,
        config: PredictionNegatives,
        item_counts: Tensor,
        *,
        calibration: float,
        seed: int,
        name: str,
        max_length: int,
    ) -> None:
        super().__init__(config, item_counts, seed=seed, name=name, max_length=max_length)
        num_others = len(item_counts) - 1
        if calibration and config.num > num_others:
            raise ValueError(
                f"pretrain.objectives: {name} by gbce calibrates for items that are not drawn; "
                f"negatives.num is {config.num}, and there are {num_others} other items; "
                'lower it, or set loss to "bce"'
            )
        # β = α (t (1 − 1/α) + 1/α), without division by what may be 0
        self.beta = 1 - calibration * (1 - config.num / num_others) if calibration else 1.0

    def total(
        self, query: Tensor, items: Tensor, drawn: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        positive, negatives = drawn["positive"], drawn["negatives"]
        score = (query * F.embedding(positive, items)).sum(1) / temperature
        if self.shared:
            scores = query @ F.embedding(negatives, items).T / temperature
        else:
            scores = own_scores(query, items, negatives) / temperature
        is_hit = negatives == positive[:, None]
        # log σ^β as β log σ: σ itself is 0 for scores below −104 in float32.
        of_negatives = F.logsigmoid(-scores).masked_fill(is_hit, 0).sum()
        total = -(self.beta * F.logsigmoid(score).sum() + of_negatives)
        return total / (1 + negatives.shape[-1])


def own_scores(query: Tensor, items: Tensor, ids: Tensor) -> Tensor:
    """Inner products of each query with items of its own; (B, M, D) vectors are never held.

    Args:
        query: (B, D).  items: (V, D).  ids: (B, M) int64 in [0, V).
    Returns:
        (B, M). Its gradients add up in the same order each time. There is no second derivative.
    """
    return _OwnScores.apply(query, items, ids)


class _OwnScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, items: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(query, items, ids)
        scores = query.new_empty(ids.shape)
        size = max(1, BLOCK // max(1, ids.shape[1] * query.shape[1]))
        for some, their_ids, out in zip(
            query.split(size), ids.split(size), scores.split(size), strict=True
        ):
            out[:] = torch.einsum("bd,bmd->bm", some, F.embedding(their_ids, items))
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, items, ids = ctx.saved_tensors
        of_query = F.embedding_bag(ids, items, per_sample_weights=grad, mode="sum")
        # By item: the queries that it was scored for, in their order.
        by_item, order = ids.flatten().sort(stable=True)
        begins = torch.searchsorted(by_item, torch.arange(len(items), device=ids.device))
        asked_by, weight = order // ids.shape[1], grad.flatten()[order]
        of_items = F.embedding_bag(asked_by, query, begins, per_sample_weights=weight, mode="sum")
        return of_query, of_items, None
