"""What `make reproduce` runs are configurations, and what it wrote is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from torchrec_pt.config_file import load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def test_every_recipe_and_comparison_is_a_configuration() -> None:
    from recipe_runs import NUM_SEEDS, comparison_runs, recipe_run
    from recipes import COMPARISONS, RECIPES

    runs = [recipe_run(recipe, seed) for recipe in RECIPES for seed in range(NUM_SEEDS)]
    for comparison in COMPARISONS:
        runs += comparison_runs(comparison, 0)
    for run in runs:
        config = load_config(run.file, run.overrides)
        assert config.run_dir == run.folder
        assert config.pretrain is not None


def test_both_arms_of_a_comparison_train_for_as_many_epochs_from_the_same_seed() -> None:
    from recipe_runs import comparison_runs
    from recipes import COMPARISONS

    for comparison in COMPARISONS:
        begun, after, alone = (
            load_config(run.file, run.overrides) for run in comparison_runs(comparison, 3)
        )
        assert begun.pretrain is not None
        assert after.pretrain is not None
        assert alone.pretrain is not None
        assert begun.pretrain.epochs + after.pretrain.epochs == alone.pretrain.epochs
        assert begun.seed == after.seed == alone.seed == 3
        assert after.model == alone.model
        assert after.pretrain.objectives == alone.pretrain.objectives
        assert after.pretrain.continue_from == begun.run_dir / "pretrain"


def _finish(run: Any, ndcg: float) -> None:
    """What a run leaves, without the run."""
    metrics = {"hr@10": 2 * ndcg, "ndcg@10": ndcg, "mrr": ndcg}
    evaluation = {
        task: {"metrics": {"popularity": metrics, "pretrained": metrics}}
        for task in ("ranking", "sampled_ranking")
    }
    curve = [{"epoch": 5, "metrics": {"ndcg@10": ndcg}}]
    trained = {"seconds": 60.0, "monitor": "ndcg@10", "curve": curve}
    done = {"digest": run.digest, "num_threads": 1, "machine": "a machine"}
    for name, found in (
        ("evaluate/result.json", evaluation),
        ("pretrain/result.json", trained),
        ("done.json", done),
    ):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text(json.dumps(found))


def test_the_page_has_means_over_seeds_and_leaves_out_what_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recipe_runs
    from recipes import COMPARISONS, RECIPES
    from results_page import write_page

    monkeypatch.setattr(recipe_runs, "RUNS", tmp_path / "runs")
    whole, partial = RECIPES[0], RECIPES[-1]
    for seed, ndcg in enumerate((0.04, 0.05, 0.06)):
        _finish(recipe_runs.recipe_run(whole, seed), ndcg)
    _finish(recipe_runs.recipe_run(partial, 0), 0.01)
    first = COMPARISONS[0]
    for seed in range(first.num_seeds):
        _, after, alone = recipe_runs.comparison_runs(first, seed)
        _finish(after, 0.05)
        _finish(alone, 0.03 if seed else 0.04)
    page = write_page(tmp_path / "results.md").read_text()
    assert "0.0500 ± 0.0100" in page
    assert whole.name in page
    assert partial.name not in page
    # Differences .01, .02, .02, .02, .02: mean .018, deviation .00447, t(4) = 2.776
    assert "+0.0180 ± 0.0056" in page
    others = [f"{c.recipe} after {c.pretraining.name}" for c in COMPARISONS[1:]]
    assert f"Not run over all seeds yet: {', '.join(others)}." in page
