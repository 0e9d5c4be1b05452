"""What may start, what is skipped, how a job ends: no Ray is started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.resources import num_places, num_side_by_side
from cluster.stages import (
    Outcome,
    Stage,
    exit_code,
    finished_tasks,
    ready,
    skipped,
    stages_of,
)
from tests.conftest import tiny_config
from torchrec_pt.config import RunConfig

DONE, FAILED = Outcome("done"), Outcome("failed", "no ratings", 2)
TASKS = ("finetune:ctr", "finetune:ranking", "finetune:rating")


@pytest.fixture
def stages(tmp_path: Path) -> list[Stage]:
    return stages_of(_config(tmp_path))


def _config(folder: Path) -> RunConfig:
    training = {"epochs": 1, "batch_size": 10}
    finetune = {
        "ctr": {**training, "positive_rating": 4},
        "ranking": training,
        "rating": training,
    }
    return tiny_config(folder, finetune=finetune)


def _names(stages: list[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def test_every_task_is_a_stage_of_its_own(stages: list[Stage]) -> None:
    assert _names(stages) == ["prepare", "pretrain", *TASKS, "evaluate"]


def test_a_run_without_tasks_is_judged_after_pretraining(tmp_path: Path) -> None:
    stages = stages_of(tiny_config(tmp_path))
    assert _names(stages) == ["prepare", "pretrain", "evaluate"]
    ended = {"prepare": DONE, "pretrain": DONE}
    assert _names(ready(stages, (), ended)) == ["evaluate"]


def test_tasks_start_together_and_the_rest_one_after_the_other(stages: list[Stage]) -> None:
    ended: dict[str, Outcome] = {}
    waves = []
    while wave := _names(ready(stages, (), ended)):
        waves.append(wave)
        ended |= dict.fromkeys(wave, DONE)
    assert waves == [["prepare"], ["pretrain"], [*TASKS], ["evaluate"]]
    assert exit_code(stages, ended) == 0


def test_what_has_begun_does_not_start_again(stages: list[Stage]) -> None:
    ended = {"prepare": DONE, "pretrain": DONE}
    assert _names(ready(stages, TASKS[:1], ended)) == [*TASKS[1:]]
    assert ready(stages, ["prepare"], {}) == []


def test_a_task_that_failed_leaves_the_others_to_be_judged(stages: list[Stage]) -> None:
    ended = {"prepare": DONE, "pretrain": DONE, TASKS[0]: FAILED, TASKS[1]: DONE}
    assert skipped(stages, ended) == {}
    assert ready(stages, TASKS[2:], ended) == []  # the third still trains
    ended[TASKS[2]] = DONE
    assert _names(ready(stages, (), ended)) == ["evaluate"]
    assert finished_tasks(ended) == ("ranking", "rating")
    assert exit_code(stages, {**ended, "evaluate": DONE}) == 1


def test_what_needs_a_stage_that_failed_is_skipped(stages: list[Stage]) -> None:
    ended = {"prepare": DONE, "pretrain": FAILED}
    ended |= skipped(stages, ended)
    assert ready(stages, (), ended) == []
    assert {name for name, one in ended.items() if one.state == "skipped"} == {*TASKS, "evaluate"}
    assert ended["evaluate"].message == "needs pretrain"
    assert exit_code(stages, ended) == 2  # the failure's own, as nothing came of the run


def test_a_stage_that_is_skipped_takes_along_what_needs_it(stages: list[Stage]) -> None:
    found = skipped(stages, {"prepare": FAILED})
    assert list(found) == ["pretrain", *TASKS, "evaluate"]
    assert found["evaluate"].message == "needs pretrain"


def test_stages_side_by_side_write_apart(stages: list[Stage]) -> None:
    written = [folder for stage in stages for folder in stage.writes]
    assert len(written) == len(set(written))
    for stage in stages:
        assert stage.kind == "evaluate" or set(stage.writes) <= set(stage.reads)


def test_no_more_stages_train_at_a_time_than_get_their_workers() -> None:
    for places, workers, expected in [(6, 2, 3), (5, 2, 2), (2, 2, 1), (1, 2, 1), (0, 1, 1)]:
        assert num_side_by_side(workers, places) == expected


def test_a_worker_takes_a_cpu_and_where_it_trains_on_gpus_one_of_them_too() -> None:
    resources = {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}
    assert num_places(resources, on_gpus=False) == 8
    assert num_places(resources, on_gpus=True) == 2
    assert num_places({}, on_gpus=True) == 0
