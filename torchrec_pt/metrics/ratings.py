"""Metrics of predicted ratings."""

from __future__ import annotations

from torch import Tensor

from torchrec_pt.metrics.estimates import Estimate, mean_of_rows


def rating_metrics(predictions: Tensor, labels: Tensor, users: Tensor) -> dict[str, Estimate]:
    """ "rmse" and "mae" of predicted ratings.

    Args:
        predictions, labels: (P,).
        users: (P,) int64 from 0 without gaps, whose row it is.
    """
    error = predictions.double() - labels.double()
    mse = mean_of_rows(error.square(), users)
    rmse = mse.value**0.5
    return {
        # d √x = dx / (2 √x)
        "rmse": Estimate(rmse, mse.influence / max(2 * rmse, 1e-12)),
        "mae": mean_of_rows(error.abs(), users),
    }
