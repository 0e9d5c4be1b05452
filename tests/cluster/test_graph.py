"""Runs as Ray jobs, each with its own processes: the slow tests of the suite."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cluster.submit import python_path

CONFIG = """\
run_dir = "run"

[data]
format = "tsv"
path = "log.tsv"
columns = { rating = "rating", timestamp = "timestamp" }

[model]
dim = 16
num_layers = 1
max_length = 8

[pretrain]
epochs = 1
batch_size = 10
warmup_steps = 0
objectives = [{ name = "masked_item" }]

[finetune.ranking]
epochs = 1
batch_size = 10
warmup_steps = 0
control = "scratch"

[evaluate]
ks = [10]
baselines = ["popularity"]
"""


@pytest.fixture
def folder(tmp_path: Path, cycle_folder: Path) -> Path:
    """Where the user stands: run.toml with relative paths, and the data."""
    (tmp_path / "run.toml").write_text(CONFIG)
    (tmp_path / "log.tsv").symlink_to(cycle_folder / "log.tsv")
    return tmp_path


SERVE = """\
import sys
from cluster.submit import local_ray
with local_ray(num_workers=2) as address:
    print(address, flush=True)
    sys.stdin.read()
"""


TOKEN = secrets.token_hex(16)


def environment() -> dict[str, str]:
    """This package, this python and one token for every process."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return {**os.environ, **auth, "PATH": path, "PYTHONPATH": python_path()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster whose nodes have the package installed."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()  # the end of its input is its sign to stop


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def written_metrics(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "evaluate/result.json").read_text())["ranking"]["metrics"])


def test_a_local_job_gives_the_metrics_of_torchrun(folder: Path) -> None:
    job = python(folder, "cluster.submit", "run.toml", "--local")
    assert job.returncode == 0, job.stdout + job.stderr
    for line in (
        f"Ray {version('ray')}: 2 workers on CPUs; dashboard: http://127.0.0.1:",
        "prepare: 37 users, 30 items",
        "On the test split",
        "Recommended to user u0",
        "all of it is in run/",
    ):
        assert line in job.stdout
    assert "RayTrainWorker" not in job.stdout + job.stderr

    torchrun = python(
        folder,
        *("torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "torchrec_pt", "run", "run.toml", "--set", "run_dir=torchrun"),
    )
    assert torchrun.returncode == 0, torchrun.stderr
    expected = written_metrics(folder / "torchrun")
    assert list(expected) == ["popularity", "pretrained", "scratch", "fine-tuned"]
    assert written_metrics(folder / "run") == {
        # The same steps on the same ranks: nothing may differ but the last bits.
        model: pytest.approx(metrics, rel=1e-6)
        for model, metrics in expected.items()
    }


def submitted(folder: Path, cluster: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "cluster.submit", *arguments, "--address", cluster)


def test_a_mistake_found_by_the_workers_of_a_cluster_is_one_line(
    folder: Path, cluster: str
) -> None:
    absolute = ["--set", f"run_dir={folder / 'run'}", "--set", f"data.path={folder / 'no.tsv'}"]
    done = submitted(folder, cluster, "run.toml", "--follow", *absolute)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert f"torchrec-pt: data.path: {folder / 'no.tsv'} does not exist; check the path" in output
    assert "Traceback" not in output
    # Workers are not started again for what no second try mends.
    assert "workers failed" not in output

    job = done.stdout.split()[1].removesuffix(";")
    for words, said in (
        (["status", job], "FAILED"),
        (["logs", job], "does not exist; check the path"),
        (["list"], f"{job}  FAILED"),
        (["stop", job], "was FAILED already"),
    ):
        assert said in submitted(folder, cluster, *words).stdout
    unknown = submitted(folder, cluster, "status", "no-such-job")
    assert unknown.returncode == 1
    assert "no-such-job does not exist" in unknown.stderr
    assert unknown.stderr.count("\n") == 1


KILL = """\
import os, signal, sys
from ray.util.state import list_actors
alive = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
os.kill(list_actors(sys.argv[1], filters=alive, detail=True)[-1].pid, signal.SIGKILL)
"""


@pytest.mark.soak
def test_a_run_whose_worker_is_killed_goes_on_from_its_checkpoint(
    folder: Path, cluster: str
) -> None:
    def run(name: str) -> str:
        done = submitted(
            *(folder, cluster, "run.toml", "--follow"),
            *("--set", f"run_dir={folder / name}", "--set", f"data.path={folder / 'log.tsv'}"),
            *("--set", "pretrain.epochs=200", "--set", "pretrain.keep_checkpoints=200"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill_a_worker_after_the_first_epoch() -> None:
        while not list((folder / "killed/pretrain/checkpoints").glob("*[1-9]/complete.json")):
            time.sleep(0.05)
        subprocess.run([sys.executable, "-c", KILL, cluster], env=environment(), check=True)

    killer = threading.Thread(target=kill_a_worker_after_the_first_epoch, daemon=True)
    killer.start()
    output = run("killed")
    assert output.count("workers failed: ") == 1
    assert "pretrain: resumed at epoch" in output
    run("whole")
    assert written_metrics(folder / "killed") == {
        model: pytest.approx(metrics, rel=1e-6)
        for model, metrics in written_metrics(folder / "whole").items()
    }
