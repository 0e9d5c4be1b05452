"""What a finished run shows on the screen."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from torchrec_pt.config import RunConfig
from torchrec_pt.evaluation import TaskEvaluation
from torchrec_pt.metrics import goodness
from torchrec_pt.pipeline import Evaluation, RunResult

# What the screen shows of each task; result.json and report.html hold the rest.
SHOWN = {
    "ranking": ("ndcg@10", "hr@10"),
    "sampled_ranking": ("ndcg@10", "hr@10"),
    "ctr": ("auc", "logloss"),
    "rating": ("rmse", "mae"),
}
SHORT = {"sampled_ranking": "sampled"}  # no wider than the other tasks
TRAINED = ("pretrained", "scratch", "fine-tuned")


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """One row a metric: the best baseline, the control, the pretrained model, what it gave."""
    notes = ["difference: pretrained − scratch, ± 95 % paired over users"]
    if "sampled_ranking" in evaluation:
        notes += [
            f"{SHORT.get(task, task)}: {one.protocol}"
            for task, one in evaluation.items()
            if one.protocol
        ]
    caption = "\n".join(notes)
    table = Table(title="On the test split", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("baseline", "scratch", "pretrained", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, result in evaluation.items():
        known = next(iter(result.metrics.values()), {})
        shown = [metric for metric in SHOWN[task] if metric in known]
        for metric in shown or _at_other_ks(SHOWN[task], known):
            table.add_row(SHORT.get(task, task), metric.upper(), *_cells(result, metric))
        table.add_section()
    console.print(table)


def _at_other_ks(metrics: Iterable[str], known: Iterable[str]) -> list[str]:
    names = {metric.partition("@")[0] for metric in metrics}
    return [metric for metric in known if metric.partition("@")[0] in names]


def _cells(result: TaskEvaluation, metric: str) -> list[str]:
    values = {model: metrics[metric] for model, metrics in result.metrics.items()}
    baselines = {model: value for model, value in values.items() if model not in TRAINED}
    best = sorted(baselines, key=lambda model: -goodness(metric, baselines[model]))[:1]
    trained = values.get("fine-tuned", values.get("pretrained"))
    difference, half_width = result.control.get(metric, (None, None))
    return [
        f"{best[0]} {values[best[0]]:.4f}" if best else "",
        f"{values['scratch']:.4f}" if "scratch" in values else "",
        f"{trained:.4f}" if trained is not None else "",
        f"{difference:+.4f} ± {half_width:.4f}" if difference is not None else "",
    ]


def print_run(result: RunResult, config: RunConfig, console: Console) -> None:
    print_evaluation(result.evaluation, console)
    table = Table(title=f"Recommended to user {result.user}")
    table.add_column("item")
    if config.show.title is not None:
        table.add_column(config.show.title)
    table.add_column("score", justify="right")
    for one in result.recommendations:
        title = [str(one.features[config.show.title])] if config.show.title is not None else []
        table.add_row(str(one.item), *title, f"{one.score:.3f}")
    console.print(table)
    console.print(f"Done in {result.seconds:.0f} s; all of it is in {config.run_dir}/")
