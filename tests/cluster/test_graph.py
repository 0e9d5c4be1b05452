"""Runs as jobs on a Ray of this machine, held against the same runs without Ray."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train
import tomli_w
from rich.console import Console

from cluster.job_file import JobFile
from cluster.nodes import ENVIRONMENT, LocalCluster
from cluster.observer import SCORE
from cluster.storage import Storage
from tests.conftest import tiny_config
from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig

ROOT = Path(__file__).parents[2]
TRAINING = {"epochs": 1, "batch_size": 10, "warmup_steps": 0}
PRETRAIN = {**TRAINING, "objectives": [{"name": "masked_item"}]}
# What a loaded machine may take; nothing waits for it where all is well.
PATIENCE_S = 400


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three CPUs for Ray to deal out, whatever this machine has."""
    with LocalCluster(cpus_per_node=3, environment={"PYTHONPATH": str(ROOT)}) as nodes:
        yield nodes


@pytest.fixture
def folder(tmp_path: Path, cycle_folder: Path) -> Path:
    (tmp_path / "log.tsv").symlink_to(cycle_folder / "log.tsv")
    return tmp_path


def _environment(cluster: LocalCluster) -> dict[str, str]:
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ENVIRONMENT, **path, "RAY_ADDRESS": cluster.address}


def _begin(
    cluster: LocalCluster, config: RunConfig, workers: int, **options: Any
) -> subprocess.Popen[str]:
    """The driver of a job, as the Jobs API would start it."""
    path = config.run_dir.parent / "job.json"
    asked = {"config": config.model_dump(mode="json"), "max_failures": 1, **options}
    job = JobFile(name="demo", min_workers=workers, max_workers=workers, **asked)
    path.write_text(job.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.entry", str(path)],
        env=_environment(cluster),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(driver: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = driver.communicate(timeout=PATIENCE_S)
    finally:
        driver.kill()
    return subprocess.CompletedProcess(driver.args, driver.returncode, out, err)


def _events(run_dir: Path, stage: str, rank: int | str) -> list[dict[str, Any]]:
    path = run_dir / "logs" / f"{stage}-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _wait_for(found: Callable[[], Any], driver: subprocess.Popen[str]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


@pytest.mark.filterwarnings("ignore:The `parse_obj` method:DeprecationWarning")  # Ray's own
def test_tasks_train_side_by_side_and_one_that_fails_leaves_the_others_done(
    cluster: LocalCluster, folder: Path
) -> None:
    tasks = {"ranking": {**TRAINING, "control": "scratch"}, "rating": TRAINING}
    plain = tiny_config(folder, pretrain=PRETRAIN, finetune=tasks, run_dir=folder / "plain")
    # No interaction is labelled a click.
    config = tiny_config(folder, pretrain=PRETRAIN, finetune={**tasks, "ctr": TRAINING})
    (folder / "kept").mkdir()
    job = _ended(_begin(cluster, config, workers=1, storage=str(folder / "kept")))
    assert job.returncode == 1, job.stderr
    for line in (
        "1 worker on CPUs; dashboard: http://127.0.0.1:",
        "prepare: 37 users, 30 items",
        "pretrain: 4 steps in ",
        "finetune:ctr: failed; finetune.ctr: needs labels",
        "ranking (scratch): 4 steps in ",
        "On the test split",
        "Recommended to user u0",
        f"all of it is in {folder / 'run'}/",
    ):
        assert line in job.stdout
    assert job.stderr.startswith("torchrec-pt: finetune:ctr: finetune.ctr: needs labels")
    assert job.stderr.count("\n") == 1

    pipeline.run(plain)
    # Another node would find all of it.
    Storage.open(str(folder / "kept"), "demo").fetch(folder / "elsewhere")
    for path in ("evaluate/result.json", "prepared/manifest.json"):
        expected = (folder / "plain" / path).read_bytes()
        assert (folder / "run" / path).read_bytes() == expected
        assert (folder / "elsewhere" / path).read_bytes() == expected
    for stage in ("pretrain", "finetune/ranking/scratch", "finetune/rating/pretrained"):
        values = [
            {**json.loads((folder / run / stage / "result.json").read_text()), "seconds": 0}
            for run in ("plain", "run", "elsewhere")
        ]
        assert values[1:] == values[:1] * 2

    said = Console(file=io.StringIO(), soft_wrap=True)
    pipeline.pretrain(config, said)
    pipeline.finetune(config, said, tasks=[*tasks])
    assert said.file.getvalue().count(": done before; valid ") == 4

    slugs = [f"finetune-{task}" for task in config.finetune.tasks]
    seen = [_events(folder / "run", slug, "driver") for slug in slugs]
    assert [one["event"] for events in seen for one in events] == ["begun", "ended"] * 3
    assert max(begun["time"] for begun, _ in seen) < min(ended["time"] for _, ended in seen)
    assert [ended["state"] for _, ended in seen] == ["failed", "done", "done"]
    _check_reports(folder / "run", folder / "kept/demo/ray")


def _check_reports(run_dir: Path, of_ray: Path) -> None:
    """What Ray Train knows of a stage, and what the log does."""
    ranking = ray.train.Result.from_path(str(of_ray / "finetune-ranking"))
    best = json.loads((run_dir / "finetune/ranking/pretrained/result.json").read_text())
    assert ranking.metrics["valid/ndcg@10"] == best["metrics"]["ndcg@10"]
    assert ranking.metrics[SCORE] == best["metrics"]["ndcg@10"]
    names = {file.name for file in Path(ranking.checkpoint.path).iterdir()}
    assert {"complete.json", "state.json"} <= names
    events = _events(run_dir, "finetune-ranking", 0)
    assert [one["event"] for one in events] == ["started", *["validated"] * 4, "ended"]
    assert {(one["job"], one["stage"], one["rank"]) for one in events} == {
        ("demo", "finetune:ranking", 0)
    }
    assert [one["step"] for one in events[1:-1]] == [0, 4, 0, 4]


@pytest.mark.soak  # `test_faults` kills more, and compares less
def test_two_workers_one_of_them_killed_give_the_metrics_of_two_without_ray(
    cluster: LocalCluster, folder: Path
) -> None:
    pretrain = {**PRETRAIN, "epochs": 40, "keep_checkpoints": 40}
    config = tiny_config(folder, pretrain=pretrain)
    driver = _begin(cluster, config, workers=2)
    log = folder / "run"
    _wait_for(lambda: len(_events(log, "pretrain", 0)) > 4, driver)
    os.kill(_events(log, "pretrain", 1)[0]["pid"], signal.SIGKILL)
    job = _ended(driver)
    assert job.returncode == 0, job.stdout + job.stderr
    lost = "pretrain: lost 1 of 2 workers (rank 1: its process died, killed or out of memory)"
    assert f"{lost}; going on from the last checkpoint (restart 1 of 1)" in job.stdout
    assert "pretrain: resumed at epoch " in job.stdout
    (event,) = [one for one in _events(log, "pretrain", "driver") if "lost" in one]
    assert (event["lost"], event["num_workers"], event["restarts"]) == ([1], 2, 1)

    toml, plain = folder / "plain.toml", config.model_copy(update={"run_dir": folder / "plain"})
    toml.write_text(tomli_w.dumps(plain.model_dump(mode="json", exclude_unset=True)))
    subprocess.run(
        [sys.executable, "-m", "torchrec_pt", "run", str(toml), "--workers", "2"],
        env=_environment(cluster),
        check=True,
        timeout=PATIENCE_S,
        stdout=subprocess.DEVNULL,
    )
    done, expected = (
        json.loads((folder / run / "evaluate/result.json").read_text())["ranking"]["metrics"]
        for run in ("run", "plain")
    )
    # The same steps on the same ranks: nothing may differ but the last bits.
    assert done == {name: pytest.approx(values, rel=1e-6) for name, values in expected.items()}


def test_what_the_workers_refuse_is_one_line_and_the_rest_is_skipped(
    cluster: LocalCluster, folder: Path
) -> None:
    config = tiny_config(folder, show={"user": "nobody"})
    job = _ended(_begin(cluster, config, workers=2, ingest="ray"))
    assert job.returncode == 2, job.stdout + job.stderr
    assert "prepare: 333 interactions by Ray Data in " in job.stdout
    assert f"interactions in {folder / 'run/prepared'}" in job.stdout
    first, second = job.stderr.splitlines()
    assert first.startswith("torchrec-pt: prepare: ")
    assert "nobody" in first
    assert second == "torchrec-pt: not begun: pretrain, evaluate"


@pytest.mark.soak
def test_a_job_of_a_finished_run_trains_nothing(cluster: LocalCluster, folder: Path) -> None:
    config = tiny_config(folder, finetune={"rating": TRAINING})
    first = _ended(_begin(cluster, config, workers=2))
    assert first.returncode == 0, first.stderr
    results = [
        folder / "run" / stage / "result.json"
        for stage in ("pretrain", "finetune/rating/pretrained")
    ]
    left = [result.read_bytes() for result in results]
    again = _ended(_begin(cluster, config, workers=1))
    assert again.returncode == 0, again.stderr
    assert "pretrain: done before; valid ndcg@10 " in again.stdout
    assert "rating (pretrained): done before; valid rmse " in again.stdout
    assert " steps in " not in again.stdout
    assert [result.read_bytes() for result in results] == left
