"""Metrics of ratings against torchmetrics."""

from __future__ import annotations

import pytest
from torchmetrics.functional import mean_absolute_error, mean_squared_error

from tests.metrics.judged import judged
from torchrec_pt.metrics import rating_metrics


def test_rating_metrics_agree_with_torchmetrics() -> None:
    a, b, _, users = judged()
    found = rating_metrics(a, b, users)
    assert found["rmse"].value == pytest.approx(float(mean_squared_error(a, b, squared=False)))
    assert found["mae"].value == pytest.approx(float(mean_absolute_error(a, b)))
