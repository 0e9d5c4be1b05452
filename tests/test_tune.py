"""The search: its space, its draws, its trials, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_config
from torchrec_pt import pipeline, trials
from torchrec_pt import tune as search
from torchrec_pt.config import Domain, RunConfig, TuneConfig
from torchrec_pt.config_file import ConfigError, load_config, with_values
from torchrec_pt.data.errors import DataError
from torchrec_pt.train import TrainingError
from torchrec_pt.trials import Trial
from torchrec_pt.tune import Found, tune

BASE = """
run_dir = "runs/x"
[data]
format = "csv"
path = "log.csv"
[pretrain]
objectives = [{ name = "next_item" }]
[finetune.ranking]
[tune]
task = "ranking"
"""


def _line(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(BASE + text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '[tune.space]\n"finetune.ranking.learning_rte" = { choices = [1e-3] }',
            'tune.space: finetune.ranking.learning_rte: unknown key; did you mean "learning_rate"?',
        ),
        (
            '[tune.space]\n"pretrain.objectives.1.temperature" = { choices = [1.0] }',
            'tune.space: pretrain.objectives.1.temperature: "1" is no index of a list of 1',
        ),
        (
            "[tune.space]\nmodel.dim = { choices = [64, 60] }",
            "tune.space: model.dim: input should be a multiple of 8, given 60",
        ),
        (
            "[tune.space]\nmodel.dropout = { low = 0.0, high = 1.0 }",
            "tune.space: model.dropout: input should be less than or equal to 0.99, given 1.0",
        ),
        (
            '[tune.space]\nfinetune.ranking.loss = { choices = ["softmax", "brp"] }',
            'tune.space: finetune.ranking.loss: unknown value "brp"; did you mean "bpr"?',
        ),
        (
            "[tune.space]\nmodel.dropout = { lo = 0.0, high = 1.0 }",
            'tune.space.model.dropout.lo: unknown key; did you mean "low"?',
        ),
        (
            "[tune.space]\nmodel.dropout = { low = 0.1 }",
            "tune.space.model.dropout: needs choices = [...], or both low and high",
        ),
        (
            "[tune.space]\nmodel.dropout = { low = 0.5, high = 0.1 }",
            "tune.space.model.dropout: low (0.5) must be smaller than high (0.1)",
        ),
        (
            "[tune.space]\nmodel.dropout = { low = 0, high = 0.5, log = true }",
            "tune.space.model.dropout: log wants low above 0 and no step; leave log out, or mend "
            "that",
        ),
        (
            "[tune.space]\nmodel.num_layers = { low = 1, high = 2.5, integer = true }",
            "tune.space.model.num_layers: integer wants low, high and step to be whole numbers",
        ),
        (
            "[tune.space]\nmodel.dropout = { choices = [0.1], low = 0.5 }",
            "tune.space.model.dropout: choices stand alone; leave low, high, log, step and integer "
            "out",
        ),
        (
            "[tune.space]\ndata.filters.min_rating = { choices = [1.0] }",
            'tune: space: with task = "ranking" a trial changes keys of model, pretrain, '
            "finetune.ranking; given data.filters.min_rating; leave it out",
        ),
        (
            '[tune.space]\n"pretrain.objectives.0" = { choices = [{ name = "masked_item" }] }\n'
            '"pretrain.objectives.0.weight" = { choices = [1.0] }',
            "tune: space: pretrain.objectives.0.weight lies within pretrain.objectives.0; leave "
            "one of them out",
        ),
        ("", "tune.space: required, but missing; add it"),
    ],
)
def test_a_mistake_in_the_space_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    assert _line(tmp_path, text) == line


def test_the_judged_stage_must_be_configured(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(BASE + "[tune.space]\nmodel.dropout = { choices = [0.1] }")
    with pytest.raises(ConfigError, match=r'tune.task: "ctr" is not configured; add \[finetune.c'):
        load_config(tmp_path / "run.toml", ["tune.task=ctr"])


def test_the_example_is_a_search() -> None:
    config = load_config(Path(__file__).parents[1] / "configs/tune_ctr.toml")
    assert config.tune is not None
    assert config.tune.shares_pretraining


def test_a_key_may_be_quoted_or_not(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    spaces = []
    for key in ("pretrain.objectives.0.temperature", '"pretrain.objectives.0.temperature"'):
        path.write_text(BASE + f"[tune.space]\n{key} = {{ low = 0.05, high = 1.0, log = true }}")
        config = load_config(path)
        assert config.tune is not None
        spaces.append(config.tune.space)
    assert spaces[0] == spaces[1]
    assert list(spaces[0]) == ["pretrain.objectives.0.temperature"]


@pytest.mark.parametrize(
    ("domain", "first", "last"),
    [
        (Domain(choices=("a", "b", "c")), "a", "c"),
        (Domain(low=1, high=3), 1.0, 3.0),
        (Domain(low=1e-4, high=1e-2, log=True), 1e-4, 1e-2),
        (Domain(low=0.1, high=0.55, step=0.2), 0.1, 0.5),
        (Domain(low=32, high=130, step=32, integer=True), 32, 128),
        (Domain(low=1, high=3, integer=True), 1, 3),
        (Domain(low=2, high=64, log=True, integer=True), 2, 64),
    ],
)
def test_a_domain_gives_its_ends_and_only_what_it_contains(
    domain: Domain, first: Any, last: Any
) -> None:
    assert (domain.at(0.0), domain.at(1 - 1e-9)) == (first, last)
    for place in range(1000):
        value = domain.at(place / 1000)
        assert domain.contains(value)
        assert isinstance(value, type(first))
    assert not domain.contains(0)
    assert not domain.contains("d")


def test_a_log_range_has_as_many_small_values_as_large_ones() -> None:
    domain = Domain(low=1e-4, high=1.0, log=True)
    assert domain.at(0.5) == pytest.approx(1e-2, rel=1e-3)


@pytest.fixture
def folder(tmp_path: Path, cycle_folder: Path) -> Path:
    (tmp_path / "log.tsv").symlink_to(cycle_folder / "log.tsv")
    return tmp_path


SPACE = {
    "finetune.ranking.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    "finetune.ranking.loss": {"choices": ["softmax", "bpr"]},
}
RANKING = {"epochs": 2, "batch_size": 10, "warmup_steps": 0, "learning_rate": 1e-4}


def _config(
    folder: Path, space: dict[str, Any] = SPACE, task: str = "ranking", **tune: Any
) -> RunConfig:
    return tiny_config(
        folder,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "attention": "causal"},
        pretrain={"epochs": 1, "batch_size": 10, "objectives": [{"name": "next_item"}]},
        finetune={"ranking": {**RANKING, "control": "scratch"}},
        tune={"task": task, "num_trials": 3, "space": space, **tune},
    )


def _outcomes(found: Found) -> list[tuple[dict[str, Any], str, dict[str, float]]]:
    return [(trial.values, trial.state, trial.metrics) for trial in found.trials]


def test_draws_depend_on_the_seed_alone_and_more_trials_only_add_some(folder: Path) -> None:
    few, many, other = (
        list(trials.trials_to_run(_config(folder, num_trials=num, seed=seed)))
        for num, seed in ((5, 0), (9, 0), (9, 1))
    )
    assert few == many[:5]
    assert many[0] == other[0]  # as the configuration stands
    assert many[0][1] == {
        "finetune.ranking.learning_rate": 1e-4,
        "finetune.ranking.loss": "softmax",
    }
    assert not any(values in [v for _, v in many[1:]] for _, values in other[1:])


def test_no_trial_is_run_twice_and_a_small_space_ends_the_search(folder: Path) -> None:
    space = {"finetune.ranking.loss": SPACE["finetune.ranking.loss"]}
    drawn = [values for _, values in trials.trials_to_run(_config(folder, space, num_trials=9))]
    assert drawn == [{"finetune.ranking.loss": loss} for loss in ("softmax", "bpr")]


def test_the_best_of_a_search_is_a_run_of_its_own(folder: Path) -> None:
    config = _config(folder)
    found = tune(config)
    assert [trial.state for trial in found.trials] == ["done"] * 3
    best = max(found.trials, key=lambda trial: trial.score)
    # A learning rate of 1e-4 moves nothing in two epochs of a tiny set.
    assert best.number > 0

    written = load_config(found.best)
    assert written == with_values(config, best.values)
    assert written.tune is None
    assert written.finetune.ranking is not None
    assert written.finetune.ranking.control == "scratch"
    text = found.best.read_text()
    assert (
        f"number {best.number}: valid ndcg@10 {best.metrics['ndcg@10']:.4f}" in text.split("\n")[0]
    )

    results = pipeline.finetune(written)["ranking"]
    assert results["pretrained"].metrics == best.metrics


def test_trials_share_what_they_do_not_change_and_look_at_no_test_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    train_stage = pipeline.train_stage

    def recorded(*args: Any, **kwargs: Any) -> Any:
        stages.append(f"{args[0].config.run_dir.name}/{kwargs['folder']}")
        return train_stage(*args, **kwargs)

    monkeypatch.setattr(pipeline, "train_stage", recorded)
    monkeypatch.setattr(pipeline, "evaluate", None)
    tune(_config(folder))
    assert stages == [
        "run/pretrain",
        *(f"trial-00{number}/finetune/ranking/pretrained" for number in range(3)),
    ]
    assert not list(folder.glob("run/tune/trial-*/prepared"))

    # The same folders, and now each trial pretrains for itself.
    stages.clear()
    tune(_config(folder, {"model.dropout": {"choices": [0.1, 0.3]}}, num_trials=2))
    assert stages == [
        f"trial-00{number}/{stage}"
        for number in range(2)
        for stage in ("pretrain", "finetune/ranking/pretrained")
    ]
    assert not list(folder.glob("run/pretrain/checkpoints.old-*"))


def test_trials_may_start_from_the_model_of_another_run(folder: Path) -> None:
    before = _config(folder)
    pipeline.prepare(before)
    start = pipeline.pretrain(before)
    raw = before.model_dump(mode="json", exclude_unset=True, exclude={"pretrain"})
    raw["run_dir"] = str(folder / "after")
    raw["finetune"]["start_from"] = str(start.folder)
    config = RunConfig.model_validate(raw)
    found = tune(config)
    assert [trial.state for trial in found.trials] == ["done"] * 3
    best = max(found.trials, key=lambda trial: trial.score)
    results = pipeline.finetune(load_config(found.best))["ranking"]
    assert results["pretrained"].metrics == best.metrics
    assert tune(config) == found


def test_a_killed_search_goes_on_with_the_same_trials_to_the_same_best(
    folder: Path, cycle_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    elsewhere = tmp_path_factory.mktemp("whole")
    (elsewhere / "log.tsv").symlink_to(cycle_folder / "log.tsv")
    whole = tune(_config(elsewhere))

    run: list[int] = []
    run_trial = search.run_trial

    def dies_in_the_second(config: RunConfig, number: int, *rest: Any) -> Trial:
        run.append(number)
        if run == [0, 1]:
            raise KeyboardInterrupt
        return run_trial(config, number, *rest)

    monkeypatch.setattr(search, "run_trial", dies_in_the_second)
    config = _config(folder)
    with pytest.raises(KeyboardInterrupt):
        tune(config)
    resumed = tune(config)
    assert run == [0, 1, 1, 2]
    assert _outcomes(resumed) == _outcomes(whole)
    assert with_values(load_config(resumed.best), {}).finetune == load_config(whole.best).finetune

    assert _outcomes(tune(config)) == _outcomes(whole)
    assert run == [0, 1, 1, 2]
    # Another configuration is another search.
    other = with_values(config, {"finetune.ranking.epochs": 1}).model_copy(
        update={"tune": config.tune}
    )
    tune(other)
    assert run == [0, 1, 1, 2, 0, 1, 2]


def test_a_loss_that_is_not_finite_and_values_that_do_not_fit_end_a_trial_and_not_the_search(
    folder: Path,
) -> None:
    space = {
        "pretrain.learning_rate": {"choices": [3e-3, 1e30]},
        "model.dim": {"choices": [16, 24]},
        "model.num_heads": {"choices": [2, 3]},
    }
    found = tune(_config(folder, space, task="pretrain", num_trials=30))
    assert len(found.trials) == 9  # the space has eight, and the configuration as it stands
    reasons = {trial.reason.split(":")[0] for trial in found.trials if trial.state == "failed"}
    assert reasons == {"pretrain", "model"}
    for trial in found.trials:
        fits = trial.values["model.dim"] % trial.values["model.num_heads"] == 0
        is_done = fits and trial.values["pretrain.learning_rate"] < 1
        assert trial.state == ("done" if is_done else "failed"), trial
    assert max(found.trials, key=lambda trial: trial.score).state == "done"
    # Those that failed are not run again either.
    assert _outcomes(tune(_config(folder, space, task="pretrain", num_trials=30))) == _outcomes(
        found
    )


def test_a_search_of_which_nothing_comes_says_why(folder: Path) -> None:
    space = {"pretrain.learning_rate": {"choices": [1e30]}}
    config = with_values(_config(folder), {"pretrain.learning_rate": 1e30})
    config = config.model_copy(update={"tune": TuneConfig(task="pretrain", space=space)})
    with pytest.raises(TrainingError, match="none of 1 trials came to its end; trial 0: pretrain"):
        tune(config)


def test_what_no_other_values_mend_ends_the_search(folder: Path) -> None:
    (folder / "log.tsv").unlink()
    with pytest.raises(DataError, match="does not exist"):
        tune(_config(folder))
    with pytest.raises(ValueError, match=r"add \[tune\] and \[tune.space\]"):
        tune(tiny_config(folder))


def test_a_damaged_record_is_one_line(folder: Path) -> None:
    config = _config(folder, num_trials=1)
    tune(config)
    path = folder / "run/tune/trials.jsonl"
    assert json.loads(path.read_text())["number"] == 0
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="is no record of trials; move it away"):
        tune(config)
