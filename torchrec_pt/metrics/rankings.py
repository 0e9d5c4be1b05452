"""Metrics of rankings: of the ranks of the relevant items, and of the lists that are offered."""

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
        "ndcg@k" (binary gains, Järvelin and Kekäläinen 2002), "precision@k" (over k, however
        long the list), "map@k" (precision at each relevant item's rank, 0 past k, summed and
        divided by the number of relevant items, at most k), and "mrr" of the best rank.
    """
    users, num_relevant = ranks.rows, ranks.lengths
    ascending = ranks.values[ranks.argsort()]
    precision = (ranks.positions + 1) / ascending.double()  # at each relevant item's rank
    discount = 1 / torch.log2(ascending.double() + 1)
    best = ascending[ranks.offsets[:-1]]

    def per_user(values: Tensor) -> Tensor:
        zeros = torch.zeros(ranks.num_rows, dtype=torch.float64)
        return zeros.index_add(0, users, values.double())

    metrics: dict[str, Tensor] = {}
    for k in ks:
        hits = ascending <= k
        num_hits, most = per_user(hits), num_relevant.clamp(max=k)
        ideal = (1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))).cumsum(0)
        metrics[f"hr@{k}"] = (best <= k).double()
        metrics[f"recall@{k}"] = num_hits / num_relevant
        metrics[f"ndcg@{k}"] = per_user(hits * discount) / ideal[most - 1]
        metrics[f"precision@{k}"] = num_hits / k
        metrics[f"map@{k}"] = per_user(hits * precision) / most
    metrics["mrr"] = 1 / best.double()
    return metrics


OF_ONE_RELEVANT_ITEM = ("hr@", "ndcg@", "mrr")  # recall@k is hr@k; precision@k, hr@k / k


def sampled_ranking_metrics(ranks: Jagged, ks: Sequence[int]) -> dict[str, Tensor]:
    """Metrics of each user whose relevant items came out at these ranks, each in a list of its own.

    Args:
        ranks: one row a user, non-empty; (T,) int64 ranks from 1.
    Returns:
        (num_users,) float64 each, means over the user's lists: "hr@k", "ndcg@k", and "mrr".
    """
    one_each = torch.arange(len(ranks.values) + 1)
    return {
        name: torch.zeros(ranks.num_rows, dtype=torch.float64).index_add(0, ranks.rows, values)
        / ranks.lengths
        for name, values in ranking_metrics(Jagged(ranks.values, one_each), ks).items()
        if name.startswith(OF_ONE_RELEVANT_ITEM)
    }


def novelty(lists: Jagged, item_counts: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Mean self-information of the items that each user is offered (Zhou et al. 2010).

    That is −log2 of the item's share of all training interactions (as Vargas and Castells 2011
    estimate that an item is met by choice); an item without any counts as one with one.

    Args:
        lists: one row a user, non-empty; (T,) int64 items, best first.
        item_counts: (num_items,) int64 training interactions of each item.
    Returns:
        "novelty@k" -> (num_users,) float64: over the first k, or over all of a shorter list.
    """
    bits = torch.log2(item_counts.sum().double()) - torch.log2(item_counts.clamp(min=1).double())
    means = {}
    for k in ks:
        first = lists.filter(lists.positions < k)
        sums = torch.zeros(first.num_rows, dtype=torch.float64)
        means[f"novelty@{k}"] = sums.index_add(0, first.rows, bits[first.values]) / first.lengths
    return means


def offered(lists: Jagged, num_items: int, k: int) -> Tensor:
    """(num_items,) bool: whether an item is among the first k of any row of `lists`."""
    is_offered = torch.zeros(num_items, dtype=torch.bool)
    is_offered[lists.values[lists.positions < k]] = True
    return is_offered
