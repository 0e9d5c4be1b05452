"""docs/results.md from what reproduce.py has run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from finetuning_page import finetuning_parts
from recipe_runs import NUM_SEEDS, comparison_runs
from recipes import COMPARISONS, FULL, RECIPES, SAMPLED, Comparison
from run_results import (
    Result,
    described,
    difference,
    load_all,
    load_recipe,
    markdown_table,
    recipe_table,
    values_of,
)

HEAD = """# Results

Written by `make reproduce`; the numbers are what it ran. Each user's last interaction is the test,
the one before it chooses the epoch and chose the settings; test figures of earlier settings were
seen on the way, and because some lay below a published one, LastFM was tuned on and the two
protocols got a recipe each. Full catalogue: the item is ranked among all that the user did not take
before. 1 + 99: among 99 drawn uniformly from those the user never took (LastFM: S3-Rec's own draw).
Ours: mean ± standard deviation over {num_seeds} seeds.
Minutes: of training with its validations, {conditions}.
"""


def write_page(path: Path) -> Path:
    """What has been run so far; a recipe or comparison without all of its seeds is left out.

    A part of which nothing has been run here stays as it stands in the file.
    """
    parts = {**_pretraining_parts(), **finetuning_parts(path.parent)}
    if not any(parts.values()):
        raise SystemExit("reproduce: no recipe has run over all its seeds; nothing to write yet")
    standing = _standing_parts(path)
    texts = [text or standing.get(title, "") for title, text in parts.items()]
    path.write_text("\n".join(text for text in texts if text), encoding="utf-8")
    return path


def _standing_parts(path: Path) -> dict[str, str]:
    """First line -> text, of what stands before the first heading and below each."""
    if not path.is_file():
        return {}
    parts = re.split(r"\n(?=###? )", path.read_text(encoding="utf-8"))
    return {part.partition("\n")[0]: part for part in parts}


def _pretraining_parts() -> dict[str, str]:
    """First line -> text, empty where nothing has been run."""
    found = [(recipe, load_recipe(recipe)) for recipe in RECIPES]
    whole = [(recipe, results) for recipe, results in found if results]
    head = recipes = ""
    if whole:
        conditions = described(whole[0][1][0].conditions)
        head = HEAD.format(num_seeds=NUM_SEEDS, conditions=conditions)
        recipes = f"## Recipes\n\n{recipe_table((FULL, SAMPLED), whole)}"
    return {"# Results": head, "## Recipes": recipes, "## Does pretraining pay?": _comparisons()}


# --- comparisons --------------------------------------------------------------------------------

QUESTION = """## Does pretraining pay?

The comparisons were written down ([recipes.py](../benchmarks/recipes.py)) before any of them had
ended, and all that have run are here, whichever way they fell. One arm spends half of its epochs on
another objective and goes on with each next item (`pretrain.continue_from`); the other spends all
of them on next items. Same model (with learned positions), number of epochs and seeds; both
choose their epoch on the validation split. The interval is Student's 95 % of the paired
difference over seeds.
"""


def _comparisons() -> str:
    rows, missing = [], []
    for comparison in COMPARISONS:
        runs = [comparison_runs(comparison, seed) for seed in range(comparison.num_seeds)]
        after, alone = load_all([run[1] for run in runs]), load_all([run[2] for run in runs])
        if after and alone:
            rows.append(_comparison_row(comparison, after, alone))
        else:
            missing.append(f"{comparison.recipe} after {comparison.pretraining.name}")
    if not rows:
        return ""
    columns = ("recipe", "pretrained with", "epochs", "seeds", "NDCG@10 after", "alone")
    columns = (*columns, "NDCG@10, difference", "HR@10, difference")
    not_run = f"\nNot run over all seeds yet: {', '.join(missing)}.\n" if missing else ""
    return f"{QUESTION}\n{markdown_table(columns, rows)}{not_run}"


def _comparison_row(
    comparison: Comparison, after: Sequence[Result], alone: Sequence[Result]
) -> list[str]:
    def values(results: Sequence[Result], metric: str) -> list[float]:
        return values_of(results, FULL, "pretrained", metric)

    half = comparison.epochs // 2
    return [
        comparison.recipe,
        comparison.pretraining.name,
        f"{half} + {comparison.epochs - half}",
        str(comparison.num_seeds),
        f"{mean(values(after, 'ndcg@10')):.4f}",
        f"{mean(values(alone, 'ndcg@10')):.4f}",
        difference(values(after, "ndcg@10"), values(alone, "ndcg@10")),
        difference(values(after, "hr@10"), values(alone, "hr@10")),
    ]
