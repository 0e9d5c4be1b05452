"""Intervals against their formulas and the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metrics.judged import NUM_USERS, judged
from torchrec_pt.metrics import (
    Estimate,
    click_metrics,
    compared,
    mean_estimate,
    paired_difference,
    rating_metrics,
)

CLICKS = ("auc", "gauc", "logloss", "ne", "calibration", "ece")
RATINGS = ("rmse", "mae")


def test_the_paired_interval_is_that_of_the_mean_difference() -> None:
    # Differences 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3.
    a, b = torch.tensor([1.0, 4, 3, 7]), torch.tensor([0.0, 2, 0, 1])
    first, second = mean_estimate(a), mean_estimate(b)
    mean, half_width = paired_difference(first, second)
    assert mean == 3
    assert half_width == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    assert paired_difference(second, first) == (-mean, pytest.approx(half_width))
    assert paired_difference(first, first) == (0, 0)


def test_the_paired_interval_agrees_with_a_bootstrap_over_users() -> None:
    draw = np.random.default_rng(0)
    ease = draw.random(400)  # users are easy or hard for both models
    a, b = ((ease + draw.random(400) > level).astype(float) for level in (0.9, 1.0))
    mean, half_width = paired_difference(
        mean_estimate(torch.from_numpy(a)), mean_estimate(torch.from_numpy(b))
    )
    means = (a - b)[draw.integers(400, size=(4000, 400))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    # A quantile of 4000 draws is off by about 4 %; 10 % leaves room for the normal approximation.
    assert mean - half_width == pytest.approx(low, abs=0.1 * half_width)
    assert mean + half_width == pytest.approx(high, abs=0.1 * half_width)


@pytest.mark.parametrize("metrics", [click_metrics, rating_metrics])
def test_intervals_of_any_metric_agree_with_a_bootstrap_over_users(
    metrics: Callable[[Tensor, Tensor, Tensor], dict[str, Estimate]],
) -> None:
    a, b, labels, users = judged()

    def found(predictions: Tensor, rows: Tensor) -> dict[str, Estimate]:
        _, user = users[rows].unique(return_inverse=True)
        every = metrics(predictions[rows], labels[rows], user)
        return {metric: compared(metric, estimate) for metric, estimate in every.items()}

    rows = torch.arange(len(a))
    first, second = found(a, rows), found(b, rows)
    starts = torch.searchsorted(users, torch.arange(NUM_USERS + 1))
    draw = np.random.default_rng(1)
    alone: dict[str, list[float]] = {metric: [] for metric in first}
    paired: dict[str, list[float]] = {metric: [] for metric in first}
    for _ in range(1000):
        chosen = draw.integers(0, NUM_USERS, NUM_USERS)
        again = torch.cat([rows[starts[user] : starts[user + 1]] for user in chosen])
        of_a, of_b = found(a, again), found(b, again)
        for metric in first:
            alone[metric].append(of_a[metric].value)
            paired[metric].append(of_a[metric].value - of_b[metric].value)
    for metric in first:
        difference, half_width = paired_difference(first[metric], second[metric])
        assert difference == pytest.approx(first[metric].value - second[metric].value)
        # The deviation of 1000 draws is off by about 2 %.
        for width, values in (
            (first[metric].half_width, alone[metric]),
            (half_width, paired[metric]),
        ):
            assert width == pytest.approx(1.96 * float(np.std(values)), rel=0.1), metric


def test_influences_sum_to_nothing() -> None:
    a, b, labels, users = judged()
    estimates = {**click_metrics(a, labels, users), **rating_metrics(a, b, users)}
    assert list(estimates) == [*CLICKS, *RATINGS]
    for name, estimate in estimates.items():
        assert len(estimate.influence) == NUM_USERS, name
        assert float(estimate.influence.sum()) == pytest.approx(0, abs=1e-12), name
