"""How sure we are of a metric, and of the difference of two models in it.

A metric comes with its influence: what each user adds to it, centred on 0. The sum of squares
of the influences is the metric's variance over users drawn anew, also where the metric is no
mean (AUC, RMSE), and the difference of two models' influences gives that of a paired
difference (the infinitesimal jackknife; Efron 1982, chapter 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric over users.

    Attributes:
        value: the metric.
        influence: (U,) float64, each user's share in its deviation; sums to 0.
    """

    value: float
    influence: Tensor

    @property
    def half_width(self) -> float:
        """Of the metric's 95 % interval."""
        num_users = len(self.influence)
        variance = self.influence.square().sum() * num_users / max(1, num_users - 1)
        return float(1.96 * variance.sqrt())


def mean_estimate(per_user: Tensor) -> Estimate:
    """The mean of a metric (U,) over users."""
    mean = per_user.double().mean()
    return Estimate(float(mean), (per_user.double() - mean) / len(per_user))


def ratio_estimate(numerator: Tensor, denominator: Tensor, users: Tensor) -> Estimate:
    """Σ numerator / Σ denominator; NaN where the latter is 0.

    Args:
        numerator, denominator: (P,) float64.
        users: (P,) int64 from 0 without gaps, whose row it is.
    """
    total = denominator.sum()
    # d (A / B) = (dA − (A / B) dB) / B
    ratio = numerator.sum() / total if total else total * torch.nan
    return Estimate(float(ratio), sum_by_user((numerator - ratio * denominator) / total, users))


def mean_of_rows(values: Tensor, users: Tensor) -> Estimate:
    """The mean of values (P,) float64 of users (P,), who have any number of rows each."""
    return ratio_estimate(values, torch.ones_like(values), users)


def sum_by_user(values: Tensor, users: Tensor) -> Tensor:
    """(U,) float64 sums of values (P,) by user (P,), int64 from 0 without gaps."""
    num_users = int(users.max()) + 1
    return torch.zeros(num_users, dtype=torch.float64).index_add(0, users, values)


def paired_difference(a: Estimate, b: Estimate) -> tuple[float, float]:
    """a − b of the same users under two models, and the half-width of its 95 % interval."""
    difference = Estimate(a.value - b.value, a.influence - b.influence)
    return difference.value, difference.half_width
