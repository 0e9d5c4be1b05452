"""Which value is better."""

from __future__ import annotations

import math

import pytest
import torch

from torchrec_pt.metrics import Estimate, compared, goodness, is_descriptive


@pytest.mark.parametrize(
    ("metric", "better", "worse"),
    [
        ("auc", 0.8, 0.7),
        ("logloss", 0.4, 0.5),
        ("ne", 0.8, 0.9),
        ("ece", 0.01, 0.02),
        ("rmse", 0.9, 1.0),
        ("map@10", 0.2, 0.1),
        ("calibration", 1.1, 0.8),
        ("calibration", 0.9, 1.2),
        ("calibration", 0.5, 2.1),
        ("calibration", 0.001, 0),
    ],
)
def test_goodness_orders_values_as_the_metric_means_them(
    metric: str, better: float, worse: float
) -> None:
    assert goodness(metric, better) > goodness(metric, worse)


def test_half_and_double_are_as_badly_calibrated_and_an_undefined_value_stays_so() -> None:
    assert goodness("calibration", 0.5) == pytest.approx(goodness("calibration", 2))
    assert math.isnan(goodness("calibration", math.nan))


def test_calibrations_are_compared_by_their_distances_from_1() -> None:
    influence = torch.tensor([0.01, -0.01], dtype=torch.float64)
    for value, sign in ((0.8, -1), (1.25, 1)):
        found = compared("calibration", Estimate(value, influence))
        assert found.value == pytest.approx(math.log(1.25))
        torch.testing.assert_close(found.influence, sign * influence / value)
    auc = Estimate(0.8, influence)
    assert compared("auc", auc) is auc


def test_only_coverage_and_novelty_are_neither_good_nor_bad() -> None:
    assert is_descriptive("coverage@10")
    assert is_descriptive("novelty@5")
    assert not any(map(is_descriptive, ("calibration", "ndcg@10", "mrr", "logloss")))
