"""<run_dir>/report.html: did pretraining pay? One page that needs no other file and no network."""

from __future__ import annotations

import functools
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cycler import cycler
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchrec_pt.files import whole_file
from torchrec_pt.metrics import LOSSES, RATIOS, goodness, is_descriptive
from torchrec_pt.runs import StageResult, load_result

TASKS = ("ranking", "ctr", "rating")
EVALUATED = ("ranking", "sampled_ranking", "ctr", "rating")

# Tones that can be read on white and on near-black; the template gives text the page's colour.
GREY = "#808080"
VERDICT_COLORS = {"better": "#2e9e6b", "worse": "#d1495b", "no clear difference": GREY}
LINES = cycler(color=["#3b82c4", "#e07b1a", "#2e9e6b", "#9b6fd0"], linestyle=["-", "--", "-.", ":"])
FIGURE_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "torchrec_pt",  # ids that are the same every time
    "text.parse_math": False,
    "figure.constrained_layout.wspace": 0.06,
    "axes.prop_cycle": LINES,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GREY),
}


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/report.html from what the run has left so far, and name what is missing.

    Training is shown for the tasks that config.json asks for, test metrics for those evaluated.

    Raises:
        ValueError: run_dir holds no config.json.
    """
    config = _read_object(run_dir / "config.json")
    if config is None:
        raise ValueError(f"{run_dir}: holds no run; give the run_dir of a torchrec-pt run")
    stages = _load_stages(run_dir, config)
    finished = [result for arms in stages.values() for result in arms.values() if result]
    evaluation = _read_object(run_dir / "evaluate" / "result.json") or {}
    evaluated = {task: evaluation[task] for task in EVALUATED if task in evaluation}
    comparisons = {
        task: _compare(task, found["metrics"], found["control"])
        for task, found in evaluated.items()
    }
    environment = Environment(
        loader=PackageLoader("torchrec_pt"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["directed"] = _directed
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        config=config,
        config_text=json.dumps(config, indent=2, ensure_ascii=False),
        stages=stages,
        seconds=sum(result.values["seconds"] for result in finished),
        comparisons=comparisons,
        forest=_draw_forest([one for each in comparisons.values() for one in each]),
        models={task: found["metrics"] for task, found in evaluated.items()},
        protocols={task: found.get("protocol") for task, found in evaluated.items()},
        best={task: _best_values(found["metrics"]) for task, found in evaluated.items()},
        reliability={task: _draw_reliability(task, found) for task, found in evaluated.items()},
        curves={name: _draw_curves(name, arms) for name, arms in stages.items()},
        moved={name: _moved_parts(arms) for name, arms in stages.items()},
    )
    path = run_dir / "report.html"
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


# --- what the run left --------------------------------------------------------------------------


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


Arms = Mapping[str, StageResult | None]


def _load_stages(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Arms]:
    """Title -> arm -> result of each configured training, None where it is not finished."""
    stages: dict[str, Arms] = {}
    if config["pretrain"] is not None or config["finetune"].get("start_from") is not None:
        stages["pretraining"] = {"pretraining": load_result(run_dir / "pretrain")}
    for task in TASKS:
        if config["finetune"].get(task) is not None:
            folder = run_dir / "finetune" / task
            stages[task] = {arm: load_result(folder / arm) for arm in ("pretrained", "scratch")}
    return stages


def _moved_parts(arms: Arms) -> list[dict[str, Any]]:
    """What each part of a model took over, as `transfer_table` left it."""
    result = arms.get("pretrained", arms.get("pretraining"))
    return [] if result is None else list(result.values.get("transfer", {}).get("parts", []))


@dataclass(frozen=True)
class Comparison:
    """One test metric of the pretrained model and of its control.

    Attributes:
        difference: pretrained − scratch, in the metric's own unit; of a ratio, of its distances
            |log| from 1.
        half_width: of the 95 % interval of the difference.
    """

    task: str
    metric: str
    scratch: float
    pretrained: float
    difference: float
    half_width: float

    @property
    def gain(self) -> float:
        """The difference, positive where pretraining is better (where nothing is, higher)."""
        return goodness(self.metric, self.pretrained) - goodness(self.metric, self.scratch)

    @property
    def is_judged(self) -> bool:
        return not is_descriptive(self.metric)

    @property
    def verdict(self) -> str:
        if not math.isfinite(self.difference + self.half_width):
            return "undefined"
        if abs(self.difference) <= self.half_width:
            return "no clear difference"
        if not self.is_judged:
            return "higher" if self.gain > 0 else "lower"
        return "better" if self.gain > 0 else "worse"


Metrics = Mapping[str, Mapping[str, float]]


def _compare(
    task: str, metrics: Metrics, control: Mapping[str, tuple[float, float]]
) -> list[Comparison]:
    return [
        Comparison(task, metric, metrics["scratch"][metric], metrics["fine-tuned"][metric], *pair)
        for metric, pair in control.items()
    ]


def _best_values(metrics: Metrics) -> dict[str, float]:
    """Metric -> its best value over the models, NaN where none is better than another.

    In the order in which metrics are met.
    """
    columns: dict[str, list[float]] = {}
    for values in metrics.values():
        for metric, value in values.items():
            columns.setdefault(metric, []).append(value)
    return {metric: _best(metric, values) for metric, values in columns.items()}


def _best(metric: str, values: Iterable[float]) -> float:
    if is_descriptive(metric):
        return math.nan
    judge = functools.partial(goodness, metric)
    return max(filter(math.isfinite, values), key=judge, default=math.nan)


def _directed(metric: str) -> str:
    """The metric's name, and where its better values lie."""
    if is_descriptive(metric):
        return metric
    if metric in RATIOS:
        return f"{metric} → 1"
    return f"{metric} {'↓' if metric in LOSSES else '↑'}"


def _number(value: float, sign: str = "-") -> str:
    """Four decimals; sign "+" also marks positive numbers."""
    return f"{value:{sign}.4f}".replace("-", "−") if math.isfinite(value) else "–"


# --- figures ------------------------------------------------------------------------------------


def _draw_forest(comparisons: list[Comparison]) -> Markup | None:
    """Gains in percent of scratch, which puts metrics of different scales on one axis."""
    drawn = [
        one
        for one in comparisons
        if one.scratch and one.is_judged and one.verdict in VERDICT_COLORS
    ]
    if not drawn:
        return None
    with style.context(["default", FIGURE_STYLE]):
        figure = Figure(figsize=(7.5, 0.7 + 0.27 * len(drawn)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=GREY, linestyle="-", linewidth=1)
        for row, one in enumerate(drawn):
            gain, half_width = (100 * x / abs(one.scratch) for x in (one.gain, one.half_width))
            color = VERDICT_COLORS[one.verdict]
            axes.errorbar(gain, row, xerr=half_width, fmt="o", capsize=3, color=color)
        axes.set_yticks(range(len(drawn)), [f"{one.task} {one.metric}" for one in drawn])
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.set_xlabel("gain over scratch in % (right of 0: pretraining is better)")
        return _svg(figure, "forest")


def _draw_reliability(task: str, found: Mapping[str, Any]) -> Markup | None:
    """Share of clicks by prediction, a line a model; None where there are no clicks."""
    bins_of: Mapping[str, list[dict[str, float]]] = found.get("reliability") or {}
    if not bins_of:
        return None
    with style.context(["default", FIGURE_STYLE]):
        figure = Figure(figsize=(5.5, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.axline((0, 0), slope=1, color=GREY, linestyle="-", linewidth=1)
        for model, bins in bins_of.items():
            prediction, share, half_width = (
                [one[name] for one in bins] for name in ("prediction", "share", "half_width")
            )
            axes.errorbar(prediction, share, yerr=half_width, marker=".", capsize=2, label=model)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("mean prediction of a bin")
        axes.set_ylabel("share that is clicked")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(bins_of))
        return _svg(figure, f"{task}-reliability")


def _draw_curves(name: str, arms: Arms) -> Markup | None:
    """Training loss and monitored metric by epoch; None if no arm is finished."""
    finished = {arm: result for arm, result in arms.items() if result}
    if not finished:
        return None
    with style.context(["default", FIGURE_STYLE]):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        loss, valid = figure.subplots(1, 2, sharex=True)
        for arm, result in finished.items():
            losses = (name for point in result.values["curve"] for name in point["losses"])
            for objective in dict.fromkeys(losses):
                label = arm if len(arms) > 1 else objective
                loss.plot(*_points(result, "losses", objective), marker=".", label=label)
            _plot_monitored(valid, arm, result)
        loss.set_ylabel("training loss")
        for axes in (loss, valid):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.lines:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1))
        return _svg(figure, name)


def _plot_monitored(axes: Axes, arm: str, result: StageResult) -> None:
    metric = result.values.get("monitor", "ndcg@10")
    epochs, values = _points(result, "metrics", metric)
    best = _best(metric, values)
    axes.set_ylabel(f"{metric} on validation")
    if math.isfinite(best):
        at = values.index(best)
        (line,) = axes.plot(epochs, values, marker=".")
        line.set_label(f"{arm}: best {_number(best)} at epoch {epochs[at]}")
        color = line.get_color()
        axes.plot(epochs[at], best, "o", markersize=11, markerfacecolor="none", color=color)


def _points(result: StageResult, kind: str, name: str) -> tuple[list[int], list[float]]:
    points = [point for point in result.values["curve"] if name in point[kind]]
    return [point["epoch"] for point in points], [point[kind][name] for point in points]


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an element of the page, with ids that no other figure has."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]  # an XML head has no place within HTML
    return Markup(re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text))
