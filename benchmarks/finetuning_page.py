"""The parts of docs/results.md about fine-tuning: recipes, ranking losses, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from curve_plot import Point, save_curves
from recipe_runs import NUM_SEEDS, recipe_run, variation_run
from recipes import (
    CLICKS,
    CURVES,
    FINETUNED,
    FIVE_FOLDS,
    FRACTIONS,
    FULL,
    LOSSES,
    ONE_FOLD,
    PAIRWISE,
    Recipe,
    Study,
)
from run_results import (
    METRICS,
    NAMES,
    Result,
    best_epochs,
    described,
    difference,
    load_all,
    load_recipe,
    markdown_table,
    over_seeds,
    recipe_table,
    values_of,
)

TABLES = {"Clicks": (CLICKS,), "Ratings": (ONE_FOLD, FIVE_FOLDS), "Ranking": (FULL,)}
FINETUNING = """## Fine-tuning

A recipe pretrains and fine-tunes; the epoch of each is chosen on the validation split. From
scratch: the same model, fine-tuned for as many epochs without the pretrained weights. Clicks:
ratings of 4 or more, on a random tenth. Ratings: GroupLens' folds; a twentieth of base, drawn by a
fixed seed, is the validation split. Ranking: each user's last interaction, full catalogue.
Settings were chosen on validation splits of seed 0 (ratings: of u1); test figures of earlier
settings were seen for clicks, ranking and u1 on the way. Mean ± standard deviation over
{num_seeds} seeds. Minutes are of pretraining and fine-tuning with their validations, without the
control; those of ratings are of all five folds. Below each table is what pretraining and
fine-tuning add: fine-tuned against the other models of the same run, the difference, paired over
the seeds with Student's 95 % interval. Of logloss, RMSE and MAE less is better, of all others more.
"""


def finetuning_parts(docs: Path) -> dict[str, str]:
    """First line -> text, empty where nothing has been run. A plot is saved beside the page."""
    tables = _tables()
    head = FINETUNING.format(num_seeds=NUM_SEEDS) if any(tables.values()) else ""
    return {
        "## Fine-tuning": head,
        **tables,
        "## Ranking losses": _losses(),
        "## Learning curves": _curves(docs),
    }


# --- recipes ------------------------------------------------------------------------------------


def _tables() -> dict[str, str]:
    """First line -> a table of each task."""
    found = [(recipe, load_recipe(recipe)) for recipe in FINETUNED]
    parts = {}
    for title, protocols in TABLES.items():
        of_table = [(r, results) for r, results in found if r.figures[0].protocol in protocols]
        whole = [(recipe, results) for recipe, results in of_table if results]
        parts[f"### {title}"] = _table(title, protocols, whole) if whole else ""
    return parts


def _table(
    title: str, protocols: Sequence[str], whole: Sequence[tuple[Recipe, list[Result]]]
) -> str:
    conditions = whole[0][1][0].conditions
    rows = [row for recipe, results in whole for row in _added_rows(recipe, results)]
    added = markdown_table(("recipe, protocol", "against", "difference"), rows)
    table = recipe_table(protocols, whole)
    return f"### {title}\n\n{table}\nMinutes: {described(conditions)}.\n\n{added}"


def _added_rows(recipe: Recipe, results: list[Result]) -> list[list[str]]:
    rows = []
    for protocol in dict.fromkeys(figure.protocol for figure in recipe.figures):
        for other, name in (("scratch", "from scratch"), ("pretrained", "pretrained alone")):
            if other in results[0].tests[protocol]:
                cells = [
                    f"{NAMES[m]} {_gain(results, protocol, other, m)}" for m in METRICS[protocol]
                ]
                rows.append([f"{recipe.name}, {protocol}", name, "; ".join(cells)])
    return rows


def _gain(results: Sequence[Result], protocol: str, other: str, metric: str) -> str:
    return difference(
        values_of(results, protocol, "fine-tuned", metric),
        values_of(results, protocol, other, metric),
    )


# --- ranking losses -----------------------------------------------------------------------------

LOSSES_HEAD = """## Ranking losses

[{recipe}](../configs/{recipe}.toml) fine-tuned with each loss from the same pretraining, all other
settings as they are, softmax over the sampled items, too; {num_seeds} seeds. The validation split
chose the epochs.
"""


def _losses() -> str:
    seeds = range(LOSSES.num_seeds)
    found = {
        v.name: load_all([variation_run(LOSSES, v, s) for s in seeds]) for v in LOSSES.variations
    }
    whole = {name: results for name, results in found.items() if results}
    if not whole:
        return ""
    rows = []
    for name, results in whole.items():
        kind = "pairwise" if name in PAIRWISE else "listwise"
        valid = over_seeds([result.validation["ndcg@10"] for result in results])
        cells = _test_cells(results, "fine-tuned")
        rows.append([name, kind, valid, *cells, best_epochs(results)])
    any_of_them = next(iter(whole.values()))
    rows.append(["pretrained alone", "", "", *_test_cells(any_of_them, "pretrained"), ""])
    columns = ("loss", "kind", "validation NDCG@10", "test NDCG@10", "test HR@10", "best epochs")
    head = LOSSES_HEAD.format(recipe=LOSSES.recipe, num_seeds=LOSSES.num_seeds)
    missing = [name for name in found if name not in whole]
    return f"{head}\n{markdown_table(columns, rows)}{_not_run(missing)}"


def _test_cells(results: Sequence[Result], model: str) -> list[str]:
    return [over_seeds(values_of(results, FULL, model, m)) for m in ("ndcg@10", "hr@10")]


def _not_run(missing: Sequence[str]) -> str:
    return f"\nNot run over all seeds yet: {', '.join(missing)}.\n" if missing else ""


# --- learning curves ----------------------------------------------------------------------------

CURVES_HEAD = """## Learning curves

Fine-tuned on a share of the training labels, from the pretrained weights and from scratch; both
arms and all shares of a seed see the same split, and pretraining is the same at every share. Means
over {num_seeds} seeds; the difference is paired over them, with Student's 95 % interval. Ratings:
fold u1. In the plot a bar is the standard deviation over seeds.

![Learning curves](learning_curves.svg)
"""
CURVE_METRICS = {
    "ctr": ("auc", "logloss"),
    "ranking": ("ndcg@10", "hr@10"),
    "rating": ("rmse", "mae"),
}


def _curves(docs: Path) -> str:
    rows, missing = [], []
    plotted: dict[str, list[Point]] = {}
    for task, study in CURVES.items():
        main, second = CURVE_METRICS[task]
        for fraction in (*FRACTIONS, 1.0):
            results = _curve_results(study, fraction)
            if not results:
                missing.append(f"{task} at {fraction:g}")
                continue
            arms = [values_of(results, task, arm, main) for arm in ("fine-tuned", "scratch")]
            plotted.setdefault(f"{task}: {NAMES[main]}", []).append(Point(fraction, *arms))
            rows.append(
                [
                    task,
                    f"{fraction:g}",
                    NAMES[main],
                    *(f"{mean(values):.4f}" for values in arms),
                    difference(*arms),
                    f"{NAMES[second]} {_gain(results, task, 'scratch', second)}",
                ]
            )
    if not rows:
        return ""
    save_curves(docs / "learning_curves.svg", plotted)
    num_seeds = next(iter(CURVES.values())).num_seeds
    columns = ("task", "labels", "metric", "pretrained", "from scratch", "difference")
    table = markdown_table((*columns, "by another metric"), rows)
    return f"{CURVES_HEAD.format(num_seeds=num_seeds)}\n{table}{_not_run(missing)}"


def _curve_results(study: Study, fraction: float) -> list[Result]:
    """One a seed, or none; the recipe itself has all labels."""
    seeds = range(study.num_seeds)
    if fraction == 1:
        recipe = next(recipe for recipe in FINETUNED if recipe.name == study.recipe)
        return load_all([recipe_run(recipe, seed) for seed in seeds])
    variation = study.variations[FRACTIONS.index(fraction)]
    return load_all([variation_run(study, variation, seed) for seed in seeds])
