from __future__ import annotations

import datetime
import json
from pathlib import Path

from cluster.logs import Log


def test_a_line_says_when_and_of_what_job_stage_rank_and_step(tmp_path: Path) -> None:
    log = Log(tmp_path, job="demo", stage="finetune:ctr", rank=1)
    log.write("validated", step=3, metrics={"auc": 0.5}, losses={})
    log.write("ended")
    path = tmp_path / "logs" / "finetune-ctr-1.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    time = datetime.datetime.fromisoformat(first.pop("time"))
    assert time.tzinfo is not None
    assert first == {
        "job": "demo",
        "stage": "finetune:ctr",
        "rank": 1,
        "step": 3,
        "event": "validated",
        "metrics": {"auc": 0.5},
        "losses": {},
    }
    assert second["event"] == "ended"
    assert second["step"] is None


def test_lines_of_an_earlier_job_stay(tmp_path: Path) -> None:
    for job in ("first", "second"):
        Log(tmp_path, job=job, stage="pretrain", rank=0).write("started")
    lines = (tmp_path / "logs/pretrain-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["job"] for line in lines] == ["first", "second"]


def test_a_metric_that_is_undefined_is_null(tmp_path: Path) -> None:
    log = Log(tmp_path, job="demo", stage="pretrain", rank=0)
    log.write("validated", metrics={"gauc": float("nan")}, curve=[float("inf"), 1.0])
    line = json.loads(log.path.read_text(), parse_constant=lambda name: name)
    assert line["metrics"] == {"gauc": None}
    assert line["curve"] == [None, 1.0]
