"""Plots of time and memory against size, from the results that have no plot of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


@dataclass
class Panel:
    """Lines over one axis: a name -> its points (x, y)."""

    x_name: str
    y_name: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    x_scale: str = "log"
    y_scale: str = "log"

    def add(self, name: str, x: float, y: float | None) -> None:
        if y is not None:
            self.lines.setdefault(name, []).append((x, y))


def save_size_plots(results: Path) -> None:
    """Beside each result that is there, under its name."""
    for name, panels_of in PANELS.items():
        path = results / f"{name}.json"
        if path.exists():
            _save(path.with_suffix(".png"), panels_of(json.loads(path.read_text())))


def _save(path: Path, panels: Iterable[Panel]) -> None:
    shown = [panel for panel in panels if panel.lines]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(6 * len(shown), 4), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], shown, strict=True):
        for name, points in panel.lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker=".", label=name)
        axis.set(
            xscale=panel.x_scale, yscale=panel.y_scale, xlabel=panel.x_name, ylabel=panel.y_name
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    # Without the version of matplotlib, so that the same figures are the same file.
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def _preparations(result: dict[str, Any]) -> list[Panel]:
    time = Panel("interactions", "seconds")
    memory = Panel("interactions", "peak MiB")
    for row in result["sizes"]:
        time.add(row["engine"], row["num_rows"], row["wall_p50_s"])
        memory.add(row["engine"], row["num_rows"], row.get("peak_mib", row.get("driver_mib")))
    return [time, memory]


def _learning(result: dict[str, Any]) -> list[Panel]:
    """A panel a data set: NDCG@10 of the validation items against the time of training."""
    panels = []
    for name, data in result["data"].items():
        panel = Panel(f"{name}: seconds", "valid NDCG@10", y_scale="linear")
        for system, runs in data.get("reach", {}).get("curves", {}).items():
            for seed, run in enumerate(runs):
                for validation in run:
                    panel.add(f"{system}, seed {seed}", validation["at_s"], validation["ndcg"])
        panels.append(panel)
    return panels


def _serving(result: dict[str, Any]) -> list[Panel]:
    rate = Panel("clients", "requests a second")
    latency = Panel("clients", "ms")
    for load in result["loads"]:
        rate.add("answered", load["num_clients"], load["per_second"])
        latency.add("p50", load["num_clients"], load["p50_ms"])
        latency.add("p99", load["num_clients"], load["p99_ms"])
    return [rate, latency]


PANELS: dict[str, Callable[[dict[str, Any]], list[Panel]]] = {
    "prepare": _preparations,
    "ingest": _preparations,
    "sasrec": _learning,
    "serve": _serving,
}
