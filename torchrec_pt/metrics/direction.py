"""Which of two values of a metric is the better one."""

from __future__ import annotations

import math

from torchrec_pt.metrics.estimates import Estimate

LOSSES = frozenset({"logloss", "ne", "ece", "rmse", "mae"})  # smaller is better
RATIOS = frozenset({"calibration"})  # best at 1, and judged by |log|, so that ½ is as bad as 2
# What a list is like, not how good it is: items drawn at random are the most novel of all.
DESCRIPTIVE = ("coverage@", "novelty@")


def goodness(metric: str, value: float) -> float:
    """The value, turned so that larger is better; of a ratio the negative distance from 1."""
    if metric in RATIOS:
        return -distance_from_1(value)
    return -value if metric in LOSSES else value


def is_descriptive(metric: str) -> bool:
    """Whether neither a larger nor a smaller value is the better one."""
    return metric.startswith(DESCRIPTIVE)


def compared(metric: str, estimate: Estimate) -> Estimate:
    """What two models are compared by: the metric itself, or a ratio's distance from 1."""
    if metric not in RATIOS:
        return estimate
    ratio = estimate.value
    # d |log x| = sign(log x) dx / x. Near 1, where that has a kink, the interval is too wide.
    slope = math.copysign(1, ratio - 1) / ratio if ratio else math.nan
    return Estimate(distance_from_1(ratio), slope * estimate.influence)


def distance_from_1(ratio: float) -> float:
    """|log ratio|; infinite at 0."""
    return abs(math.log(ratio)) if ratio else math.inf
