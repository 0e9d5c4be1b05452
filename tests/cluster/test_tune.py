"""A search by Ray Tune: what Optuna proposes, what ASHA stops, what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.util.state import list_actors
from typer.testing import CliRunner

from cluster import tune as command
from cluster.nodes import LocalCluster
from cluster.packing import ROOT
from cluster.proposals import SCORE, Proposals
from tests.conftest import tiny_config
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config, with_values
from torchrec_pt.trials import Trial

CONFIG = """\
run_dir = "{run}"

[data]
format = "tsv"
path = "{log}"
columns = {{ rating = "rating", timestamp = "timestamp" }}

[model]
dim = 16
num_layers = 1
max_length = 8
attention = "causal"

[pretrain]
epochs = 4
batch_size = 10
warmup_steps = 0
learning_rate = 1e-2
objectives = [{{ name = "next_item" }}]

[tune]
task = "pretrain"
num_trials = 3
grace_epochs = 2

[tune.space]
pretrain.learning_rate = {{ choices = [1e-7, 1e30] }}
"""


def _write_config(folder: Path, log: Path) -> Path:
    config = folder / "run.toml"
    config.write_text(CONFIG.format(run=folder / "run", log=log))
    return config


def _search(nodes: LocalCluster, config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.tune", str(config), "--follow", *words]
    return subprocess.run(
        [*command, "--address", nodes.dashboard],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_asha_stops_what_falls_behind_and_the_best_is_written_as_without_ray(
    tmp_path: Path, cycle_folder: Path, two_nodes: LocalCluster
) -> None:
    config = _write_config(tmp_path, cycle_folder / "log.tsv")
    done = _search(two_nodes, config, "--parallel=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("submitted run-")
    assert "prepare: 37 users, 30 items" in done.stdout
    assert done.stdout.count(" of 3: ") == 3
    assert not done.stderr

    trials = _written(tmp_path)
    by_rate = {trial.values["pretrain.learning_rate"]: trial for trial in trials}
    assert {rate: trial.state for rate, trial in by_rate.items()} == {
        1e-2: "done",
        1e-7: "stopped",
        1e30: "failed",
    }
    assert by_rate[1e-7].epochs == 2
    assert "loss is not finite" in by_rate[1e30].reason
    assert by_rate[1e-2].number == 0
    best = load_config(tmp_path / "run/tune/best.toml")
    assert best == with_values(load_config(config), {})

    # The same command with more trials runs what is left, one on each node.
    more = _search(two_nodes, config, "--trials=5", "--parallel=2")
    assert more.returncode == 0, more.stdout + more.stderr
    assert "tune: 3 trials ended before" in more.stdout
    assert more.stdout.count(" of 5: ") == 2
    assert _written(tmp_path)[:3] == trials
    assert len(_written(tmp_path)) == 5
    actors = list_actors(two_nodes.dashboard, filters=[("class_name", "=", "ImplicitFunc")])
    assert {actor.node_id for actor in actors} == {two_nodes.head.id, two_nodes.workers[0].id}


@pytest.mark.soak
def test_a_mistake_that_a_search_meets_is_one_line_and_exit_code_2(
    tmp_path: Path, two_nodes: LocalCluster
) -> None:
    refused = _search(two_nodes, _write_config(tmp_path, tmp_path / "no.tsv"))
    assert refused.returncode == 2
    said = f"cluster.tune: data.path: {tmp_path}/no.tsv does not exist; check the path"
    assert said in refused.stdout.splitlines()


def _written(folder: Path) -> list[Trial]:
    lines = (folder / "run/tune/trials.jsonl").read_text().splitlines()
    return [Trial(**json.loads(line)) for line in lines]


def test_a_cluster_must_be_named_and_see_the_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "run.toml").write_text(CONFIG.format(run="run", log="log.tsv"))
    for arguments, said in (
        ([], "run_dir: on a cluster it must be absolute"),
        (["--set", "run_dir=/r", "--set", "data.path=/d"], "--address: which cluster?"),
        (["--local", "--address", "http://head:8265"], "--local: starts a Ray of its own"),
        (["--name", "a;rm", "--local"], "--name: begins with a letter"),
    ):
        done = CliRunner().invoke(command.app, [str(tmp_path / "run.toml"), *arguments])
        assert isinstance(done.exception, ValueError)
        assert str(done.exception).startswith(said)


SPACE: dict[str, Any] = {
    "pretrain.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "pretrain.weight_decay": {"low": 0.0, "high": 0.1, "step": 0.01},
    "model.dim": {"low": 16, "high": 64, "step": 16, "integer": True},
    "pretrain.objectives": {"choices": [[{"name": "masked_item"}], [{"name": "next_item"}]]},
}


def _config(tmp_path: Path, seed: int = 0) -> RunConfig:
    tune = {"task": "pretrain", "num_trials": 12, "seed": seed, "space": SPACE}
    return tiny_config(tmp_path, tune=tune)


def _proposed(proposals: Proposals, num: int) -> list[dict[str, Any]]:
    given = []
    for place in range(num):
        given.append(proposals.suggest(str(place)))
        score = -given[-1]["values"]["model.dim"]
        proposals.on_trial_complete(str(place), {SCORE: score, "training_iteration": 1})
    return given


def test_proposals_lie_in_the_space_and_depend_on_the_seed(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert config.tune is not None
    given = _proposed(Proposals(config, {}), 12)
    assert [one["number"] for one in given] == list(range(12))
    assert given[0]["values"]["pretrain.learning_rate"] == 1e-3  # as it stands
    for one in given[1:]:
        for key, value in one["values"].items():
            assert config.tune.space[key].contains(value)
        with_values(config, one["values"])
    assert _proposed(Proposals(config, {}), 12) == given
    assert _proposed(Proposals(_config(tmp_path, seed=1), {}), 12)[1:] != given[1:]


def test_what_ended_before_is_known_and_not_proposed_again(tmp_path: Path) -> None:
    config = _config(tmp_path)
    given = _proposed(Proposals(config, {}), 6)
    ended = {
        one["number"]: Trial(one["number"], one["values"], "failed")
        for one in given
        if one["number"] != 2
    }
    resumed = _proposed(Proposals(config, ended), 7)
    assert [one["number"] for one in resumed] == [2, *range(6, 12)]
    before = [one["values"] for one in given]
    assert not any(one["values"] in before for one in resumed)
