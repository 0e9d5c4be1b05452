"""docs/results.md from what reproduce.py has run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from recipe_runs import NUM_SEEDS, Run, comparison_runs, recipe_run
from recipes import COMPARISONS, FULL, RECIPES, SAMPLED, Comparison, Figure, Recipe
from scipy.stats import t

PROTOCOLS = {FULL: "full catalogue", SAMPLED: "1 + 99"}
HEAD = """# Results

Written by `make reproduce`; the numbers are what it ran. Each user's last interaction is the test,
the one before it chooses the epoch and chose the settings; test figures of earlier settings were
seen on the way, and because some lay below a published one, LastFM was tuned on and the two
protocols got a recipe each. Full catalogue: the item is ranked among all that the user did not take
before. 1 + 99: among 99 drawn uniformly from those the user never took (LastFM: S3-Rec's own draw).
Ours: mean ± standard deviation over {num_seeds} seeds.
Minutes: of training with its validations, {threads}, on {machine}, as it was shared then.
"""


@dataclass(frozen=True)
class Result:
    """What one run left on the disk."""

    tests: dict[str, dict[str, dict[str, float]]]
    minutes: float
    epoch: int
    conditions: dict[str, Any]

    @classmethod
    def load(cls, run: Run) -> Result | None:
        if not run.is_done:
            return None
        evaluation = json.loads((run.folder / "evaluate/result.json").read_text())
        trained = json.loads((run.folder / "pretrain/result.json").read_text())
        best = max(trained["curve"], key=lambda entry: entry["metrics"][trained["monitor"]])
        return cls(
            tests={name: found["metrics"] for name, found in evaluation.items()},
            minutes=trained["seconds"] / 60,
            epoch=best["epoch"],
            conditions=json.loads((run.folder / "done.json").read_text()),
        )


def write_page(path: Path) -> Path:
    """What has been run so far; a recipe or comparison without all of its seeds is left out."""
    recipes = {r.name: _all([recipe_run(r, seed) for seed in range(NUM_SEEDS)]) for r in RECIPES}
    some = next((results[0] for results in recipes.values() if results), None)
    if some is None:
        raise SystemExit("reproduce: no recipe has run over all its seeds; nothing to write yet")
    threads = some.conditions["num_threads"]
    head = HEAD.format(
        num_seeds=NUM_SEEDS,
        threads="one thread" if threads == 1 else f"{threads} threads",
        machine=some.conditions["machine"],
    )
    parts = [head, _recipes_table(recipes), _comparisons_part()]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _all(runs: Sequence[Run]) -> list[Result]:
    """The results of these runs, or none where one is missing."""
    results = [Result.load(run) for run in runs]
    found = [result for result in results if result is not None]
    return found if len(found) == len(runs) else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# --- recipes ------------------------------------------------------------------------------------


def _recipes_table(recipes: dict[str, list[Result]]) -> str:
    rows = []
    for recipe in RECIPES:
        results = recipes[recipe.name]
        if not results:
            continue
        for protocol in dict.fromkeys(figure.protocol for figure in recipe.figures):
            rows += _rows(recipe, protocol, results)
    columns = ("data, protocol", "system", "HR@10", "NDCG@10", "MRR", "minutes")
    return f"## Recipes\n\n{_table(columns, rows)}"


def _rows(recipe: Recipe, protocol: str, results: list[Result]) -> list[list[str]]:
    """Ours in bold, the baselines of the same run, and others' figures."""
    place = f"{recipe.data}, {PROTOCOLS[protocol]}"
    rows = []
    for model in results[0].tests[protocol]:
        values = [_over_seeds([r.tests[protocol][model][m] for r in results]) for m in METRICS]
        if model == "pretrained":
            epochs = ", ".join(str(result.epoch) for result in results)
            config = f"[{recipe.name}](../configs/{recipe.name}.toml)"
            minutes = f"{mean(result.minutes for result in results):.1f} (best epochs {epochs})"
            name = f"**ours**: {config}, {recipe.title}"
            rows.insert(0, [place, name, *(f"**{value}**" for value in values), minutes])
        else:
            rows.append(["", f"{model}, same run", *values, ""])
    return rows + [_figure_row(f) for f in recipe.figures if f.protocol == protocol]


METRICS = ("hr@10", "ndcg@10", "mrr")


def _figure_row(figure: Figure) -> list[str]:
    values = [f"{figure.metrics[m]:.4f}" if m in figure.metrics else "" for m in METRICS]
    return ["", f"{figure.system} ({figure.source})", *values, ""]


def _over_seeds(values: list[float]) -> str:
    if max(values) == min(values):
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


# --- comparisons --------------------------------------------------------------------------------

QUESTION = """## Does pretraining pay?

The comparisons were written down ([recipes.py](../benchmarks/recipes.py)) before any of them had
ended, and all that have run are here, whichever way they fell. One arm spends half of its epochs on
another objective and goes on with each next item (`pretrain.continue_from`); the other spends all
of them on next items. Same model (with learned positions), number of epochs and seeds; both
choose their epoch on the validation split. The interval is Student's 95 % of the paired
difference over seeds.
"""


def _comparisons_part() -> str:
    rows, missing = [], []
    for comparison in COMPARISONS:
        runs = [comparison_runs(comparison, seed) for seed in range(comparison.num_seeds)]
        after, alone = _all([run[1] for run in runs]), _all([run[2] for run in runs])
        if after and alone:
            rows.append(_comparison_row(comparison, after, alone))
        else:
            missing.append(f"{comparison.recipe} after {comparison.pretraining.name}")
    columns = ("recipe", "pretrained with", "epochs", "seeds", "NDCG@10 after", "alone")
    columns = (*columns, "NDCG@10, difference", "HR@10, difference")
    not_run = f"\nNot run over all seeds yet: {', '.join(missing)}.\n" if missing else ""
    return f"{QUESTION}\n{_table(columns, rows)}{not_run}"


def _comparison_row(comparison: Comparison, after: list[Result], alone: list[Result]) -> list[str]:
    def values(results: list[Result], metric: str) -> list[float]:
        return [result.tests[FULL]["pretrained"][metric] for result in results]

    def difference(metric: str) -> str:
        pairs = zip(values(after, metric), values(alone, metric), strict=True)
        return _interval([one - other for one, other in pairs])

    half = comparison.epochs // 2
    return [
        comparison.recipe,
        comparison.pretraining.name,
        f"{half} + {comparison.epochs - half}",
        str(comparison.num_seeds),
        f"{mean(values(after, 'ndcg@10')):.4f}",
        f"{mean(values(alone, 'ndcg@10')):.4f}",
        difference("ndcg@10"),
        difference("hr@10"),
    ]


def _interval(differences: list[float]) -> str:
    center = mean(differences)
    if len(differences) < 2:
        return f"{center:+.4f}"
    error = stdev(differences) / len(differences) ** 0.5
    return f"{center:+.4f} ± {float(t.ppf(0.975, len(differences) - 1)) * error:.4f}"
