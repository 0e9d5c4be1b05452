"""What runs left on the disk, over seeds and folds, and how the page writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

from recipe_runs import NUM_SEEDS, Run, recipe_runs
from recipes import CLICKS, FIVE_FOLDS, FULL, ONE_FOLD, SAMPLED, Recipe
from scipy.stats import t

from torchrec_pt.files import write_json

_RANKING, _RATING = ("hr@10", "ndcg@10", "mrr"), ("rmse", "mae")
# Of a protocol, or a task's name; the names of evaluate/result.json
METRICS = {
    FULL: _RANKING,
    SAMPLED: _RANKING,
    CLICKS: ("auc", "logloss"),
    "rating": _RATING,
    ONE_FOLD: _RATING,
    FIVE_FOLDS: _RATING,
}
NAMES = {
    "hr@10": "HR@10",
    "ndcg@10": "NDCG@10",
    "mrr": "MRR",
    "auc": "AUC",
    "logloss": "logloss",
    "rmse": "RMSE",
    "mae": "MAE",
}

Tests = dict[str, dict[str, dict[str, float]]]  # protocol -> model -> metric -> value


@dataclass(frozen=True)
class Result:
    """What one run left, or the runs of all folds.

    Attributes:
        validation: metrics of the last training at its best epoch.
        minutes: of pretraining and fine-tuning, without the control.
        epochs: the best of the last training, one a run.
    """

    tests: Tests
    validation: dict[str, float]
    minutes: float
    epochs: tuple[int, ...]
    conditions: dict[str, Any]

    @classmethod
    def load(cls, run: Run) -> Result | None:
        """As it was recorded."""
        if not run.is_done:
            return None
        recorded = json.loads(run.record.read_text())
        del recorded["digest"]
        return cls(**{**recorded, "epochs": tuple(recorded["epochs"])})

    def save(self, run: Run) -> None:
        run.record.parent.mkdir(parents=True, exist_ok=True)
        write_json(run.record, {"digest": run.digest, **asdict(self)})

    @classmethod
    def of(cls, run: Run, conditions: dict[str, Any]) -> Result:
        """What the run left in its folder."""
        stages = ["pretrain"]
        if run.task is not None:
            stages.append(f"finetune/{run.task}/pretrained")
        trained = [json.loads((run.folder / s / "result.json").read_text()) for s in stages]
        evaluation = json.loads((run.folder / "evaluate/result.json").read_text())
        last = trained[-1]
        best, monitor = last["metrics"], last["monitor"]
        return cls(
            tests={name: found["metrics"] for name, found in evaluation.items()},
            validation=best,
            minutes=sum(stage["seconds"] for stage in trained) / 60,
            epochs=(
                next(e["epoch"] for e in last["curve"] if e["metrics"][monitor] == best[monitor]),
            ),
            conditions=conditions,
        )


def load_all(runs: Sequence[Run]) -> list[Result]:
    """The results of these runs, or none where one is missing."""
    results = [Result.load(run) for run in runs]
    found = [result for result in results if result is not None]
    return found if len(found) == len(runs) else []


def load_recipe(recipe: Recipe) -> list[Result]:
    """One a seed; none where a run is missing."""
    seeds = []
    for seed in range(NUM_SEEDS):
        results = load_all(recipe_runs(recipe, seed))
        if not results:
            return []
        seeds.append(_over_folds(results) if recipe.folds else results[0])
    return seeds


def _over_folds(results: Sequence[Result]) -> Result:
    """Of the ratings: those of the first fold, and the mean of all."""
    first = results[0].tests["rating"]
    means = {
        model: {m: mean(r.tests["rating"][model][m] for r in results) for m in _RATING}
        for model in first
    }
    return replace(
        results[0],
        tests={ONE_FOLD: first, FIVE_FOLDS: means},
        minutes=sum(result.minutes for result in results),
        epochs=tuple(epoch for result in results for epoch in result.epochs),
    )


# --- in words -----------------------------------------------------------------------------------


def values_of(results: Sequence[Result], protocol: str, model: str, metric: str) -> list[float]:
    return [result.tests[protocol][model][metric] for result in results]


def over_seeds(values: Sequence[float]) -> str:
    if max(values) == min(values):
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


def difference(ours: Sequence[float], others: Sequence[float]) -> str:
    """Paired, with Student's 95 % interval."""
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    center = mean(differences)
    if len(differences) < 2:
        return f"{center:+.4f}"
    error = stdev(differences) / len(differences) ** 0.5
    return f"{center:+.4f} ± {float(t.ppf(0.975, len(differences) - 1)) * error:.4f}"


def best_epochs(results: Sequence[Result]) -> str:
    epochs = [epoch for result in results for epoch in result.epochs]
    if len(epochs) > 5:
        return f"{min(epochs)} to {max(epochs)}"
    return ", ".join(map(str, epochs))


def described(conditions: dict[str, Any]) -> str:
    threads = conditions["num_threads"]
    in_words = "one thread" if threads == 1 else f"{threads} threads"
    return f"{in_words}, on {conditions['machine']}, as it was shared then"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def recipe_table(protocols: Sequence[str], found: Sequence[tuple[Recipe, list[Result]]]) -> str:
    """Of protocols with the same metrics."""
    rows = []
    for recipe, results in found:
        for protocol in dict.fromkeys(figure.protocol for figure in recipe.figures):
            if protocol in protocols:
                rows += _recipe_rows(recipe, protocol, results)
    metrics = [NAMES[metric] for metric in METRICS[protocols[0]]]
    return markdown_table(("data, protocol", "system", *metrics, "minutes"), rows)


_PLACES = {FULL: "full catalogue", SAMPLED: "1 + 99", CLICKS: "random 8 : 1 : 1"}
_MODELS = {"scratch": "from scratch", "pretrained": "pretrained alone"}


def _recipe_rows(recipe: Recipe, protocol: str, results: list[Result]) -> list[list[str]]:
    """Ours in bold, the other models of the same run, and others' figures."""
    metrics = METRICS[protocol]
    ours = "fine-tuned" if recipe.task else "pretrained"
    rows = []
    for model in results[0].tests[protocol]:
        values = [over_seeds(values_of(results, protocol, model, metric)) for metric in metrics]
        if model == ours:
            place = f"{recipe.data}, {_PLACES.get(protocol, protocol)}"
            config = f"[{recipe.name}](../configs/{recipe.name}.toml)"
            minutes = f"{mean(result.minutes for result in results):.1f}"
            minutes += f" (best epochs {best_epochs(results)})"
            name = f"**ours**: {config}, {recipe.title}"
            rows.insert(0, [place, name, *(f"**{value}**" for value in values), minutes])
        else:
            rows.append(["", f"{_MODELS.get(model, model)}, same run", *values, ""])
    for figure in recipe.figures:
        if figure.protocol == protocol:
            values = [f"{figure.metrics[m]:.4f}" if m in figure.metrics else "" for m in metrics]
            rows.append(["", f"{figure.system} ({figure.source})", *values, ""])
    return rows
