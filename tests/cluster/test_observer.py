"""What is reported of a stage: no Ray is started here (`test_graph` asks Ray's own result)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError

from cluster.observer import SCORE, Watch, causes, reported
from cluster.screen import failures
from cluster.stages import Stage
from cluster.work import StageWork, Work
from tests.conftest import tiny_config
from torchrec_pt.distributed import LostWorkerError
from torchrec_pt.files import link_files

LOST = LostWorkerError("lost another worker (Connection closed by peer)")


def test_of_scores_the_larger_one_is_better() -> None:
    metrics, losses = {"logloss": 0.5}, {"ctr": 0.7}
    entry = {"epoch": 1, "step": 4, "losses": losses, "metrics": metrics}
    assert reported("logloss", entry) == {
        SCORE: -0.5,
        "epoch": 1,
        "step": 4,
        "loss/ctr": 0.7,
        "valid/logloss": 0.5,
    }


def test_an_undefined_metric_is_the_worst_score() -> None:
    entry = {"epoch": 0, "step": 0, "losses": {}, "metrics": {"ndcg@10": math.nan}}
    assert reported("ndcg@10", entry)[SCORE] == -math.inf


def test_a_reported_checkpoint_takes_no_room(tmp_path: Path) -> None:
    source = tmp_path / "step-1"
    source.mkdir()
    (source / "shard").write_bytes(b"weights")
    link_files(source, tmp_path / "ray" / "checkpoint")
    assert (tmp_path / "ray/checkpoint/shard").samefile(source / "shard")


def test_a_worker_that_only_lost_another_one_is_no_cause() -> None:
    died = ActorDiedError()
    assert causes({0: LOST, 1: died}) == {1: died}
    assert causes({0: LOST, 1: LOST}) == {0: LOST, 1: LOST}


class _Spoken:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("num_workers", [2, (1, 2)])
def test_lost_workers_are_one_line_and_one_in_the_log(tmp_path: Path, num_workers: Any) -> None:
    screen: Any = _Spoken()
    given = StageWork(Work(tiny_config(tmp_path), None, screen), "demo", Stage("pretrain"))
    watch = Watch(given, max_failures=1)
    context = SimpleNamespace(scaling_config=SimpleNamespace(num_workers=num_workers))
    watch.after_report(context, [{}, {}], None)
    for _ in range(2):
        watch.after_exception(context, {0: LOST, 1: ActorDiedError()})
    lost = "pretrain: lost 1 of 2 workers (rank 1: its process died, killed or out of memory); "
    assert screen.lines == [
        f"{lost}going on from the last checkpoint (restart 1 of 1)",
        f"{lost}given up after 1 restarts",
    ]
    lines = (tmp_path / "run/logs/pretrain-driver.jsonl").read_text().splitlines()
    assert [json.loads(line)["restarts"] for line in lines] == [1, 1]
    assert json.loads(lines[0])["lost"] == [1]
    assert json.loads(lines[0])["num_workers"] == 2


def test_a_node_that_died_is_named_as_such() -> None:
    error = RayActorError(error_msg="The actor is dead because its node has died. Node Id: ab12")
    assert failures({3: error}) == "rank 3: its node died"
