"""Metrics of rankings, clicks and ratings, and how sure we are of a difference."""

from torchrec_pt.metrics.clicks import ReliabilityBin, click_metrics, reliability
from torchrec_pt.metrics.direction import LOSSES, RATIOS, compared, goodness, is_descriptive
from torchrec_pt.metrics.estimates import Estimate, mean_estimate, paired_difference
from torchrec_pt.metrics.rankings import (
    novelty,
    offered,
    ranking_metrics,
    sampled_ranking_metrics,
)
from torchrec_pt.metrics.ratings import rating_metrics

__all__ = [
    "LOSSES",
    "RATIOS",
    "Estimate",
    "ReliabilityBin",
    "click_metrics",
    "compared",
    "goodness",
    "is_descriptive",
    "mean_estimate",
    "novelty",
    "offered",
    "paired_difference",
    "ranking_metrics",
    "rating_metrics",
    "reliability",
    "sampled_ranking_metrics",
]
