"""Ranking metrics from the ranks of relevant items."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged


def ranking_metrics(ranks: Jagged, ks: Sequence[int]) -> dict[str, Tensor]:
    """Metrics of each user whose relevant items came out at these ranks.

    Args:
        ranks: one row a user, non-empty; (T,) int64 ranks from 1 of the relevant items in one
            list that holds them all.
    Returns:
        (num_users,) float64 each: "hr@k" (any relevant item among the first k), "recall@k",
        "ndcg@k" (binary gains, Järvelin and Kekäläinen 2002), and "mrr" of the best rank.
    """
    users, num_relevant = ranks.rows, ranks.lengths

    def per_user(values: Tensor) -> Tensor:
        zeros = torch.zeros(ranks.num_rows, dtype=torch.float64)
        return zeros.index_add(0, users, values.double())

    best = torch.full((ranks.num_rows,), torch.iinfo(torch.int64).max)
    best = best.scatter_reduce(0, users, ranks.values, "amin")
    discount = 1 / torch.log2(ranks.values.double() + 1)
    metrics: dict[str, Tensor] = {}
    for k in ks:
        hits = ranks.values <= k
        ideal = (1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))).cumsum(0)
        metrics[f"hr@{k}"] = (best <= k).double()
        metrics[f"recall@{k}"] = per_user(hits) / num_relevant
        metrics[f"ndcg@{k}"] = per_user(hits * discount) / ideal[num_relevant.clamp(max=k) - 1]
    metrics["mrr"] = 1 / best.double()
    return metrics


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of a − b over users, and the half-width of its 95 % interval (normal, paired).

    Args:
        a, b: (U,) one metric of the same users under two models.
    """
    difference = a.double() - b.double()
    half_width = 1.96 * difference.std(correction=1) / len(difference) ** 0.5
    return float(difference.mean()), float(half_width)
