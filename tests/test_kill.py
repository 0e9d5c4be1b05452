"""kill -9 in the middle of a run, then the same command: as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RUN

FINETUNE = """\
[finetune.ctr]
positive_rating = 3
epochs = 30
batch_size = 10
control = "scratch"
[finetune.rating]
epochs = 2
batch_size = 10
"""


def _start(folder: Path, log: Path, name: str) -> subprocess.Popen[str]:
    config = folder / f"{name}.toml"
    config.write_text(RUN.format(run_dir=folder / name, log=log, epochs=60) + FINETUNE)
    return subprocess.Popen(
        [sys.executable, "-m", "torchrec_pt", "run", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def _kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def _has_step(folder: Path, step: int) -> bool:
    """Whether a checkpoint of at least this step is whole."""
    return any(int(path.name[-8:]) >= step for path in folder.glob("checkpoints/step-*"))


@pytest.fixture(scope="module")
def whole(cycle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    _finish(_start(folder, cycle_folder / "log.tsv", "run"))
    return folder / "run"


def _equal(one: Path, other: Path) -> bool:
    """The metrics of every task and the predictions behind them, to the last bit."""
    names = ["result.json", "ranking.parquet", "ctr.parquet", "rating.parquet"]
    return all(
        (one / "evaluate" / name).read_bytes() == (other / "evaluate" / name).read_bytes()
        for name in names
    )


@pytest.mark.parametrize("stage", ["pretrain", "finetune/ctr/scratch"])
def test_a_run_killed_in_training_resumes_and_ends_with_the_same_metrics(
    whole: Path, cycle_folder: Path, tmp_path: Path, stage: str
) -> None:
    log = cycle_folder / "log.tsv"
    process = _start(tmp_path, log, "run")
    _kill_when(process, lambda: _has_step(tmp_path / "run" / stage, 20))
    assert not (tmp_path / "run" / stage / "result.json").exists()
    output = _finish(_start(tmp_path, log, "run"))
    assert "resumed at epoch" in output
    assert _equal(tmp_path / "run", whole)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(12))
def test_a_run_killed_at_any_moment_ends_with_the_same_metrics(
    whole: Path, cycle_folder: Path, tmp_path: Path, seed: int
) -> None:
    log = cycle_folder / "log.tsv"
    draw = random.Random(seed)
    for _ in range(4):
        process = _start(tmp_path, log, "run")
        try:
            process.wait(draw.uniform(1, 12))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    _finish(_start(tmp_path, log, "run"))
    assert _equal(tmp_path / "run", whole)
