"""What `make reproduce` runs are configurations, and what it wrote is whole."""

from __future__ import annotations

import itertools
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
        assert BENCHMARKS.parent / config.run_dir == run.folder
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
    from run_results import Result

    metrics = {"hr@10": 2 * ndcg, "ndcg@10": ndcg, "mrr": ndcg}
    evaluation = {
        task: {"metrics": {"popularity": metrics, "pretrained": metrics}}
        for task in ("ranking", "sampled_ranking")
    }
    best = {"ndcg@10": ndcg}
    curve = [{"epoch": 5, "metrics": best}]
    trained = {"seconds": 60.0, "monitor": "ndcg@10", "metrics": best, "curve": curve}
    for name, found in (
        ("evaluate/result.json", evaluation),
        ("pretrain/result.json", trained),
    ):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text(json.dumps(found))
    Result.of(run, {"num_threads": 1, "machine": "a machine"}).save(run)


def test_the_page_has_means_over_seeds_and_leaves_out_what_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recipe_runs
    from recipes import COMPARISONS, RECIPES
    from results_page import write_page

    monkeypatch.setattr(recipe_runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recipe_runs, "RECORDS", tmp_path / "records")
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


# --- fine-tuning --------------------------------------------------------------------------------

DATA = {"ml-100k", "ml-100k-folds", "beauty", "lastfm"}


def _names(only: str | None, data: set[str] = DATA) -> list[list[str]]:
    from reproduce import chains

    return [[run.name for run in chain] for chain in chains(only, data)]


def test_every_recipe_and_study_of_fine_tuning_is_a_configuration() -> None:
    from recipe_runs import recipe_runs, variation_run
    from recipes import FINETUNED, STUDIES

    runs = [run for recipe in FINETUNED for run in recipe_runs(recipe, 0)]
    runs += [variation_run(study, v, 0) for study in STUDIES for v in study.variations]
    for run in runs:
        config = load_config(run.file, run.overrides)
        assert BENCHMARKS.parent / config.run_dir == run.folder
        assert config.pretrain is not None
        assert run.task in config.finetune.tasks


def test_no_run_stands_in_two_chains_which_go_side_by_side() -> None:
    names = list(itertools.chain(*_names(None)))
    assert len(names) == len(set(names))


def test_what_takes_over_a_pretraining_comes_after_it_in_its_chain() -> None:
    from recipes import STUDIES
    from reproduce import chains

    for study in STUDIES:
        for first, *others in chains(study.name, DATA):
            assert "pretrain" in first.stages
            for run in others:
                assert run.pretrained == first
                assert run.stages == ("prepare", "finetune", "evaluate")


def test_only_runs_one_part_and_what_it_starts_from() -> None:
    assert len(_names("ml100k_rating")) == 3 * 5
    losses = _names("ranking_losses")
    assert [chain[0] for chain in losses] == [f"ml100k_ranking-seed{seed}" for seed in range(3)]
    assert losses[1][1:] == [
        f"ml100k_ranking-{loss}-seed1"
        for loss in ("bpr", "hinge", "softmax", "listnet", "lambda", "approx_ndcg")
    ]
    curve = _names("rating_curve")
    assert curve[4] == [
        "ml100k_rating-seed4-u1",
        *(f"ml100k_rating-labels{fraction}-seed4" for fraction in ("0.01", "0.05", "0.2")),
    ]
    assert len(curve) == 5


def test_without_the_folds_no_rating_runs() -> None:
    assert _names("ml100k_rating", {"ml-100k"}) == []
    assert len(_names("ml100k_ctr", {"ml-100k"})) == 3


def test_a_pretraining_that_is_taken_over_is_found_where_ones_own_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recipe_runs
    from recipes import LOSSES

    monkeypatch.setattr(recipe_runs, "RUNS", tmp_path)
    run = recipe_runs.variation_run(LOSSES, LOSSES.variations[0], 0)
    for name in (run.pretrained.folder / "pretrain", run.folder):
        name.mkdir(parents=True)
    (run.pretrained.folder / "pretrain/result.json").write_text("{}")
    run.link_pretraining()
    run.link_pretraining()  # as after an interruption
    assert (run.folder / "pretrain/result.json").read_text() == "{}"


def _finish_finetuning(run: Any, ours: float, scratch: float) -> None:
    """What a run leaves, without the run: the models' first metric, the second twice as much."""
    from run_results import METRICS, Result

    first, second, *more = METRICS[run.task]

    def metrics(value: float) -> dict[str, float]:
        return {first: value, second: 2 * value, **dict.fromkeys(more, value)}

    models = {"pretrained": metrics(0.01), "scratch": metrics(scratch), "fine-tuned": metrics(ours)}
    best = {first: ours, "ndcg@10": ours + 0.001}
    curve = [{"epoch": 3, "metrics": {first: 0.0}}, {"epoch": 4, "metrics": best}]
    trained = {"seconds": 60.0, "monitor": first, "metrics": best, "curve": curve}
    for name, found in (
        ("evaluate/result.json", {run.task: {"metrics": models}}),
        (f"finetune/{run.task}/pretrained/result.json", trained),
        ("pretrain/result.json", trained),
    ):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text(json.dumps(found))
    Result.of(run, {"num_threads": 1, "machine": "a machine"}).save(run)


@pytest.fixture
def _no_configuration_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import recipe_runs

    monkeypatch.setattr(recipe_runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recipe_runs, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(recipe_runs.Run, "digest", property(lambda run: run.name))


@pytest.mark.usefixtures("_no_configuration_needed")
def test_ratings_are_the_first_fold_and_the_mean_of_five(tmp_path: Path) -> None:
    from recipe_runs import recipe_runs
    from recipes import FINETUNED
    from results_page import write_page

    recipe = next(recipe for recipe in FINETUNED if recipe.task == "rating")
    for seed in range(3):
        for fold, run in enumerate(recipe_runs(recipe, seed)):
            _finish_finetuning(run, 0.90 + 0.01 * fold + 0.001 * seed, 0.95)
    page = write_page(tmp_path / "results.md").read_text()
    ours = [line for line in page.splitlines() if "**ours**" in line]
    assert ["u1 … u5" in line for line in ours] == [False, True]
    assert "**0.9010 ± 0.0010**" in ours[0]  # RMSE .900, .901, .902
    assert "**0.9210 ± 0.0010**" in ours[1]
    assert "| 10.0 (best epochs 4 to 4) |" in ours[1]  # 5 folds, two stages of a minute
    # Student's t(2) = 4.303 times .001 / √3
    assert "| ml100k_rating, u1 | from scratch | RMSE -0.0490 ± 0.0025; MAE" in page


@pytest.mark.usefixtures("_no_configuration_needed")
def test_losses_are_told_apart_by_validation_and_test_and_missing_ones_are_named(
    tmp_path: Path,
) -> None:
    from recipe_runs import variation_run
    from recipes import LOSSES
    from results_page import write_page

    for variation in LOSSES.variations[:2]:
        for seed in range(3):
            _finish_finetuning(variation_run(LOSSES, variation, seed), 0.2, 0.1)
    page = write_page(tmp_path / "results.md").read_text()
    # HR@10 .2, NDCG@10 twice that; _finish_finetuning's validation NDCG@10
    assert "| hinge | pairwise | 0.2010 | 0.4000 | 0.2000 | 4, 4, 4 |" in page
    assert "| pretrained alone |  |  | 0.0200 | 0.0100 |  |" in page
    assert "Not run over all seeds yet: softmax, listnet, lambda, approx_ndcg." in page


@pytest.mark.usefixtures("_no_configuration_needed")
def test_a_learning_curve_has_a_plot_and_paired_differences_over_five_seeds(
    tmp_path: Path,
) -> None:
    from recipe_runs import recipe_run, variation_run
    from recipes import CURVES, FINETUNED
    from results_page import write_page

    study = CURVES["ctr"]
    recipe = next(recipe for recipe in FINETUNED if recipe.name == study.recipe)
    for seed in range(5):
        for place, variation in enumerate(study.variations):
            run = variation_run(study, variation, seed)
            _finish_finetuning(run, 0.70 + 0.02 * place, 0.69 if seed else 0.68)
        _finish_finetuning(recipe_run(recipe, seed), 0.80, 0.80)
    page = write_page(tmp_path / "results.md").read_text()
    # Differences .02, .01, .01, .01, .01: mean .012, deviation .00447, t(4) = 2.776
    assert "| ctr | 0.01 | AUC | 0.7000 | 0.6880 | +0.0120 ± 0.0056 |" in page
    assert "| ctr | 1 | AUC | 0.8000 | 0.8000 | +0.0000 ± 0.0000 |" in page
    assert "Not run over all seeds yet: ranking at 0.01" in page
    plot = tmp_path / "learning_curves.svg"
    first = plot.read_bytes()
    assert b"ctr: AUC" in first
    write_page(tmp_path / "results.md")
    assert plot.read_bytes() == first


@pytest.mark.usefixtures("_no_configuration_needed")
def test_a_part_that_has_not_run_here_stays_as_it_stands(tmp_path: Path) -> None:
    from recipe_runs import recipe_runs
    from recipes import FINETUNED
    from results_page import write_page

    page = tmp_path / "results.md"
    page.write_text(
        "# Results\n\nWhat stood.\n\n## Recipes\n\n| old |\n\n## Fine-tuning\n\nold too\n"
    )
    with pytest.raises(SystemExit):
        write_page(page)
    recipe = FINETUNED[0]
    for seed in range(3):
        for run in recipe_runs(recipe, seed):
            _finish_finetuning(run, 0.8, 0.7)
    written = write_page(page).read_text()
    assert written.startswith(
        "# Results\n\nWhat stood.\n\n## Recipes\n\n| old |\n\n## Fine-tuning\n"
    )
    assert "old too" not in written
    assert write_page(page).read_text() == written
