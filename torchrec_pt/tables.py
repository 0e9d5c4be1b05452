"""What a finished run shows on the screen."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from torchrec_pt.config import RunConfig
from torchrec_pt.pipeline import Evaluation, RunResult


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """One row a model, best value of a column in bold; then the paired control."""
    names = next(iter(evaluation.metrics.values())).keys()
    # With one test item a user, recall is the hit rate: shown once.
    shown = [name for name in names if not name.startswith("recall")]
    table = Table(title="Test items ranked over the full catalogue")
    table.add_column("model")
    for name in shown:
        table.add_column(name.upper(), justify="right")
    best = {name: max(row[name] for row in evaluation.metrics.values()) for name in shown}
    for model, row in evaluation.metrics.items():
        cells = [
            f"[bold]{row[name]:.4f}[/bold]" if row[name] == best[name] else f"{row[name]:.4f}"
            for name in shown
        ]
        table.add_row(model, *cells)
    console.print(table)
    for name, (mean, half_width) in evaluation.control.items():
        if name.startswith("ndcg@10"):
            console.print(
                f"Pretraining changed {name.upper()} by {mean:+.4f} ± {half_width:.4f} "
                "over the same model from scratch (paired over users, 95 %).",
                highlight=False,
            )


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
