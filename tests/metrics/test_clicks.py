"""Metrics of clicks against scikit-learn and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_auroc

from tests.metrics.judged import NUM_USERS, judged
from torchrec_pt.metrics import Estimate, click_metrics, reliability


def test_auc_and_logloss_agree_with_independent_libraries() -> None:
    a, _, labels, users = judged()
    found = click_metrics(a, labels, users)
    assert found["auc"].value == pytest.approx(roc_auc_score(labels, a), rel=1e-12)
    expected = binary_auroc(a, labels.long())
    assert found["auc"].value == pytest.approx(float(expected), rel=1e-5)  # float32 there
    assert found["logloss"].value == pytest.approx(log_loss(labels, a), rel=1e-12)


def test_gauc_is_the_mean_of_the_users_aucs_by_their_rows_without_users_of_one_class() -> None:
    a, _, labels, users = judged()
    aucs, weights = [], []
    for user in range(NUM_USERS):
        rows = users == user
        if 0 < labels[rows].mean() < 1:
            aucs.append(roc_auc_score(labels[rows], a[rows]))
            weights.append(int(rows.sum()))
    assert len(aucs) < NUM_USERS
    found = click_metrics(a, labels, users)["gauc"].value
    assert found == pytest.approx(np.average(aucs, weights=weights), rel=1e-12)


def test_gauc_does_not_ask_for_the_rows_of_a_user_to_stand_together() -> None:
    a, _, labels, users = judged()
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    shuffled = click_metrics(a[order], labels[order], users[order])
    for name, expected in click_metrics(a, labels, users).items():
        assert shuffled[name].value == pytest.approx(expected.value, rel=1e-12), name
        torch.testing.assert_close(shuffled[name].influence, expected.influence)


def test_ne_is_logloss_beside_that_of_the_mean_label_for_every_row() -> None:
    a, _, labels, users = judged()
    same = torch.full_like(labels, float(labels.mean()))
    expected = log_loss(labels, a) / log_loss(labels, same)
    assert click_metrics(a, labels, users)["ne"].value == pytest.approx(expected, rel=1e-12)
    assert click_metrics(same, labels, users)["ne"].value == pytest.approx(1)


def test_calibration_is_predicted_clicks_over_clicks() -> None:
    a, _, labels, users = judged()
    expected = float(a.numpy().sum() / labels.numpy().sum())
    assert click_metrics(a, labels, users)["calibration"].value == pytest.approx(expected)


def test_reliability_agrees_with_scikit_learn_where_no_predictions_tie() -> None:
    a, _, labels, users = judged(digits=15)
    a, labels, users = (x[:1000] for x in (a, labels, users))
    assert len(a.unique()) == 1000
    found = reliability(a, labels, users)
    share, prediction = calibration_curve(labels, a, n_bins=10, strategy="quantile")
    assert [one.num_rows for one in found] == [100] * 10
    assert [one.share for one in found] == pytest.approx(share, rel=1e-12)
    assert [one.prediction for one in found] == pytest.approx(prediction, rel=1e-12)
    ece = click_metrics(a, labels, users)["ece"].value
    assert ece == pytest.approx(np.abs(share - prediction).mean(), rel=1e-12)


def test_equal_predictions_share_a_bin() -> None:
    predictions = torch.tensor([0.2] * 30 + [0.7] * 10)
    labels = torch.tensor([1.0, 0, 0] * 10 + [1.0] * 10)
    found = reliability(predictions, labels, torch.arange(40))
    assert [one.num_rows for one in found] == [30, 10]
    assert [one.prediction for one in found] == pytest.approx([0.2, 0.7])
    assert [one.share for one in found] == pytest.approx([1 / 3, 1])
    ece = click_metrics(predictions, labels, torch.arange(40))["ece"].value
    assert ece == pytest.approx((30 * (1 / 3 - 0.2) + 10 * 0.3) / 40)


def test_the_interval_of_a_share_agrees_with_a_bootstrap_over_users() -> None:
    a, _, labels, users = judged()
    found = reliability(a, labels, users)[5]
    inside = np.isclose(a, found.prediction, atol=0.06)  # about the rows of that bin
    clicks = np.bincount(users[inside], labels[inside], NUM_USERS)
    rows = np.bincount(users[inside], minlength=NUM_USERS)
    chosen = np.random.default_rng(1).integers(0, NUM_USERS, (2000, NUM_USERS))
    shares = clicks[chosen].sum(1) / rows[chosen].sum(1)
    num_rows = found.num_rows / inside.sum()
    # The bin is matched to some rows; 1.96 deviations of 2000 draws are off by about 2 %.
    assert found.half_width == pytest.approx(1.96 * shares.std() / math.sqrt(num_rows), rel=0.1)


def test_no_click_among_few_is_not_certain() -> None:
    found = reliability(torch.full((20,), 0.1), torch.zeros(20), torch.arange(20))
    assert found[0].share == 0
    assert 0.1 < found[0].half_width < 0.2  # clicks of one in ten would often show none


def test_one_class_leaves_undefined_what_needs_both() -> None:
    labels = {"clicks": torch.ones(2), "none": torch.zeros(2)}
    found = {
        name: click_metrics(torch.tensor([0.5, 0.25]), each, torch.arange(2))
        for name, each in labels.items()
    }
    assert _undefined(found["clicks"]) == ["auc", "gauc", "ne"]
    assert _undefined(found["none"]) == ["auc", "gauc", "ne", "calibration"]
    assert found["clicks"]["logloss"].value == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert found["clicks"]["calibration"].value == pytest.approx(0.75 / 2)


def _undefined(found: dict[str, Estimate]) -> list[str]:
    return [name for name, estimate in found.items() if math.isnan(estimate.value)]


def test_the_gauc_of_users_of_one_class_each_is_undefined() -> None:
    users, labels = torch.tensor([0, 0, 1]), torch.tensor([1.0, 1, 0])
    found = click_metrics(torch.tensor([0.5, 0.6, 0.1]), labels, users)
    assert _undefined(found) == ["gauc"]
