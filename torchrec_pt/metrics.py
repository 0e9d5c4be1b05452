"""Metrics of rankings, clicks and ratings, and how sure we are of a difference.

A metric comes with its influence: what each user adds to it, centred on 0. The sum of squares
of the influences is the metric's variance over users drawn anew, also where the metric is no
mean (AUC, RMSE), and the difference of two models' influences gives that of a paired
difference (the infinitesimal jackknife; Efron 1982, chapter 6. For the AUC it is the method of
DeLong, DeLong and Clarke-Pearson 1988, with the rows of one user taken together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged

LOSSES = frozenset({"logloss", "rmse", "mae"})  # smaller is better; of all other metrics, larger


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


def sampled_ranking_metrics(ranks: Jagged, ks: Sequence[int]) -> dict[str, Tensor]:
    """Metrics of each user whose relevant items came out at these ranks, each in a list of its own.

    Args:
        ranks: one row a user, non-empty; (T,) int64 ranks from 1.
    Returns:
        (num_users,) float64 each, means over the user's lists: "hr@k", "ndcg@k", and "mrr". With
        one relevant item a list, recall@k would be hr@k.
    """
    one_each = torch.arange(len(ranks.values) + 1)
    return {
        name: torch.zeros(ranks.num_rows, dtype=torch.float64).index_add(0, ranks.rows, values)
        / ranks.lengths
        for name, values in ranking_metrics(Jagged(ranks.values, one_each), ks).items()
        if not name.startswith("recall@")
    }


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric over users.

    Attributes:
        value: the metric.
        influence: (U,) float64, each user's share in its deviation; sums to 0.
    """

    value: float
    influence: Tensor


def mean_estimate(per_user: Tensor) -> Estimate:
    """The mean of a metric (U,) over users."""
    mean = per_user.double().mean()
    return Estimate(float(mean), (per_user.double() - mean) / len(per_user))


def paired_difference(a: Estimate, b: Estimate) -> tuple[float, float]:
    """a − b of the same users under two models, and the half-width of its 95 % interval."""
    num_users = len(a.influence)
    variance = (a.influence - b.influence).square().sum() * num_users / max(1, num_users - 1)
    return a.value - b.value, float(1.96 * variance.sqrt())


def click_metrics(predictions: Tensor, labels: Tensor, users: Tensor) -> dict[str, Estimate]:
    """ "auc" and "logloss" of predicted probabilities.

    Args:
        predictions: (P,) in [0, 1].  labels: (P,) 0 or 1; the AUC is NaN where one is absent.
        users: (P,) int64 from 0 without gaps, whose row it is.
    """
    predictions, labels = predictions.double(), labels.double()
    certain = predictions.clamp(1e-7, 1 - 1e-7)
    logloss = -(labels * certain.log() + (1 - labels) * (1 - certain).log())
    auc, influence = _auc(predictions, labels > 0)
    return {
        "auc": Estimate(auc, _per_user(influence, users)),
        "logloss": _mean_of_rows(logloss, users),
    }


def rating_metrics(predictions: Tensor, labels: Tensor, users: Tensor) -> dict[str, Estimate]:
    """ "rmse" and "mae" of predicted ratings; arguments as `click_metrics`."""
    error = predictions.double() - labels.double()
    mse = _mean_of_rows(error.square(), users)
    rmse = mse.value**0.5
    return {
        # d √x = dx / (2 √x)
        "rmse": Estimate(rmse, mse.influence / max(2 * rmse, 1e-12)),
        "mae": _mean_of_rows(error.abs(), users),
    }


def _auc(predictions: Tensor, is_positive: Tensor) -> tuple[float, Tensor]:
    """P(a positive's prediction > a negative's), ties half; and (P,) the influence of each row."""
    positive, negative = predictions[is_positive], predictions[~is_positive]
    over_negatives = _share_below(positive, negative)
    over_positives = _share_below(negative, positive)
    auc = over_negatives.mean()
    influence = torch.zeros_like(predictions)
    influence[is_positive] = (over_negatives - auc) / len(positive)
    influence[~is_positive] = (1 - over_positives - auc) / len(negative)
    return float(auc), influence


def _share_below(x: Tensor, others: Tensor) -> Tensor:
    """(len(x),) the share of `others` that are smaller, ties half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)
    return below.double() / (2 * len(others))


def _mean_of_rows(values: Tensor, users: Tensor) -> Estimate:
    mean = values.mean()
    return Estimate(float(mean), _per_user((values - mean) / len(values), users))


def _per_user(influence: Tensor, users: Tensor) -> Tensor:
    num_users = int(users.max()) + 1
    return torch.zeros(num_users, dtype=torch.float64).index_add(0, users, influence)


def goodness(metric: str, value: float) -> float:
    """The value, turned so that larger is better."""
    return -value if metric in LOSSES else value
