"""Metrics of predicted clicks: how well they are ordered, and how well calibrated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_pt.metrics.estimates import Estimate, mean_of_rows, ratio_estimate, sum_by_user

NUM_BINS = 10


def click_metrics(predictions: Tensor, labels: Tensor, users: Tensor) -> dict[str, Estimate]:
    """Metrics of predicted probabilities.

    "auc" over all rows. "gauc": the mean of the users' AUCs, weighted by their rows, without
    users of one class (Zhu et al. 2017; weighted as DIN, Zhou et al. 2018). "logloss". "ne":
    logloss over the entropy of the mean label; "calibration": the sum of predictions over that
    of labels, best at 1 (both He et al. 2014, section 2). "ece": the mean distance of prediction
    and share of clicks over the bins of `reliability` (Naeini et al. 2015, with bins of equal
    mass as Nixon et al. 2019); its interval takes the bins as they are.

    Args:
        predictions: (P,) in [0, 1].  labels: (P,) 0 or 1.
        users: (P,) int64 from 0 without gaps, whose row it is.
    Returns:
        Where a class is absent auc, gauc and ne are NaN, calibration where no row is clicked.
    """
    predictions, labels = predictions.double(), labels.double()
    certain = predictions.clamp(1e-7, 1 - 1e-7)
    logloss = -(labels * certain.log() + (1 - labels) * (1 - certain).log())
    return {
        "auc": _auc(predictions, labels > 0, users),
        "gauc": _gauc(predictions, labels > 0, users),
        "logloss": mean_of_rows(logloss, users),
        "ne": _normalized_entropy(logloss, labels, users),
        "calibration": ratio_estimate(predictions, labels, users),
        "ece": _calibration_error(predictions, labels, users),
    }


# --- order --------------------------------------------------------------------------------------


def _auc(predictions: Tensor, is_positive: Tensor, users: Tensor) -> Estimate:
    """P(a positive's prediction > a negative's), ties half.

    The interval is that of DeLong, DeLong and Clarke-Pearson 1988, with the rows of one user
    taken together.
    """
    positive, negative = predictions[is_positive], predictions[~is_positive]
    over_negatives = _share_below(positive, negative)
    over_positives = _share_below(negative, positive)
    auc = over_negatives.mean()
    influence = torch.zeros_like(predictions)
    influence[is_positive] = (over_negatives - auc) / len(positive)
    influence[~is_positive] = (1 - over_positives - auc) / len(negative)
    return Estimate(float(auc), sum_by_user(influence, users))


def _share_below(x: Tensor, others: Tensor) -> Tensor:
    """(len(x),) the share of `others` that are smaller, ties half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)
    return below.double() / (2 * len(others))


def _gauc(predictions: Tensor, is_positive: Tensor, users: Tensor) -> Estimate:
    num_rows = torch.bincount(users)
    num_positive = torch.bincount(users[is_positive], minlength=len(num_rows))
    num_pairs = num_positive * (num_rows - num_positive)
    # Mann–Whitney: a user's AUC is (sum of its positives' ranks − n₊ (n₊ + 1) / 2) / (n₊ n₋)
    ranks = torch.where(is_positive, _ranks_in_user(predictions, users), 0.0)
    num_won = sum_by_user(ranks, users) - num_positive * (num_positive + 1) / 2
    is_mixed = num_pairs > 0
    weight = torch.where(is_mixed, num_rows, 0).double()
    auc = torch.where(is_mixed, num_won / num_pairs.clamp(min=1), 0.0)
    return ratio_estimate(weight * auc, weight, torch.arange(len(num_rows)))


def _ranks_in_user(x: Tensor, users: Tensor) -> Tensor:
    """(P,) float64 the rank of x (P,), from 1, among its user's; the mean rank where some tie."""
    order = x.argsort()
    order = order[users[order].argsort(stable=True)]
    user, value = users[order], x[order]
    is_first = torch.ones_like(user, dtype=torch.bool)
    is_first[1:] = (user.diff() != 0) | (value.diff() != 0)
    tie = is_first.cumsum(0) - 1
    num_tied, num_rows = torch.bincount(tie), torch.bincount(users)
    mean_place = num_tied.cumsum(0) - (num_tied - 1) / 2
    mean_rank = mean_place.double()[tie] - (num_rows.cumsum(0) - num_rows)[user]
    return torch.empty_like(mean_rank).scatter(0, order, mean_rank)


# --- calibration --------------------------------------------------------------------------------


def _normalized_entropy(logloss: Tensor, labels: Tensor, users: Tensor) -> Estimate:
    loss, clicked = mean_of_rows(logloss, users), mean_of_rows(labels, users)
    p = labels.mean()
    # NaN where p is 0 or 1: of the two products one is 0 · −∞
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    value = loss.value / entropy
    # d (L / H) = (dL − (L / H) dH) / H, and dH = log((1 − p) / p) dp
    of_entropy = ((1 - p) / p).log() * clicked.influence
    return Estimate(float(value), (loss.influence - value * of_entropy) / entropy)


def _calibration_error(predictions: Tensor, labels: Tensor, users: Tensor) -> Estimate:
    gap, bins = predictions - labels, _equal_mass_bins(predictions)
    of_bin = torch.zeros(NUM_BINS, dtype=torch.float64).index_add(0, bins, gap)
    return mean_of_rows(of_bin.sign()[bins] * gap, users)  # Σ over bins |Σ gap| / P


def _equal_mass_bins(predictions: Tensor) -> Tensor:
    """(P,) int64 in [0, NUM_BINS): as many rows each as ties, which stay together, permit."""
    num_below = torch.searchsorted(predictions.sort().values, predictions)
    return num_below * NUM_BINS // len(predictions)


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of like predictions.

    Attributes:
        share: of them that are clicked.
        half_width: of its 95 % interval, over users.
    """

    num_rows: int
    prediction: float
    share: float
    half_width: float


def reliability(predictions: Tensor, labels: Tensor, users: Tensor) -> list[ReliabilityBin]:
    """Mean prediction against share of clicks in bins of equal mass, by ascending prediction.

    Args:
        as of `click_metrics`.
    """
    predictions, labels = predictions.double(), labels.double()
    bins = _equal_mass_bins(predictions)
    found = []
    for bin in bins.unique().tolist():
        is_inside = (bins == bin).double()
        num_rows = is_inside.sum()
        share = ratio_estimate(is_inside * labels, is_inside, users)
        # Where no row is clicked, or all are, users do not differ, and yet nothing is certain:
        # at least what rows drawn one by one give (Agresti and Coull 1998).
        likely = (share.value * num_rows + 2) / (num_rows + 4)
        least = 1.96 * (likely * (1 - likely) / num_rows).sqrt()
        found.append(
            ReliabilityBin(
                num_rows=int(num_rows),
                prediction=float((is_inside * predictions).sum() / num_rows),
                share=share.value,
                half_width=max(share.half_width, float(least)),
            )
        )
    return found
