"""Learning curves: a metric over the share of labels, fine-tuned and from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """The values of both arms at a share of the labels, one a seed."""

    fraction: float
    pretrained: Sequence[float]
    scratch: Sequence[float]


# Text as text keeps the file small; without a date and with fixed ids the same values give the
# same file.
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "learning curves"}


def save_curves(path: Path, curves: Mapping[str, Sequence[Point]]) -> None:
    """One panel a curve, as SVG."""
    with matplotlib.rc_context(_SVG):
        figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axis, (title, points) in zip(panels, curves.items(), strict=True):
            fractions = [point.fraction for point in points]
            for arm, label in (("pretrained", "pretrained"), ("scratch", "from scratch")):
                values = [getattr(point, arm) for point in points]
                bars = [stdev(each) if len(each) > 1 else 0.0 for each in values]
                means = [mean(each) for each in values]
                axis.errorbar(fractions, means, bars, marker="o", capsize=3, label=label)
            axis.set_xscale("log")
            axis.set_xticks(fractions, [f"{fraction:g}" for fraction in fractions])
            axis.minorticks_off()
            axis.set_xlabel("share of the labels")
            axis.set_title(title)
            axis.grid(alpha=0.3)
        panels[0].legend()
        figure.savefig(path, metadata={"Date": None})
