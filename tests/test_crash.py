"""Several workers of one command: one that dies ends the others, with one line."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import RUN
from torchrec_pt.launch import verdict

EVALUATE = """\
[evaluate]
baselines = ["popularity"]
"""
EPOCHS = 8
# Far above the second or two that it takes, since the machine may be busy.
BOUND_S = 30
LOST = "the same command resumes from the last checkpoint"

Config = Callable[..., Path]


class Command:
    """A command line whose workers are found by a mark in their environment."""

    def __init__(self, *arguments: object, launcher: tuple[str, ...] = ()) -> None:
        self.mark = secrets.token_hex(8)
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "torchrec_pt", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CRASH_TEST": self.mark},
            text=True,
        )

    def workers(self) -> dict[int, int]:
        """Rank -> process id of those that live."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                is_python = b"torchrec_pt" in (folder / "cmdline").read_bytes()
            except OSError:
                continue
            variables = dict(line.split("=", 1) for line in lines if "=" in line)
            if variables.get("CRASH_TEST") == self.mark and "RANK" in variables and is_python:
                found[int(variables["RANK"])] = int(folder.name)
        return found

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill(self, rank: int) -> None:
        os.kill(self.workers()[rank], signal.SIGKILL)

    def end(self, timeout_s: float = 300) -> tuple[int, str, str]:
        """Exit code, output and errors; no worker is left."""
        output, errors = self.process.communicate(timeout=timeout_s)
        deadline = time.monotonic() + BOUND_S
        while self.workers():
            assert time.monotonic() < deadline, "workers outlived the command"
            time.sleep(0.05)
        return self.process.returncode, output, errors


@pytest.fixture
def config(cycle_folder: Path, tmp_path: Path) -> Iterator[Config]:
    def write(name: str = "run", epochs: int = EPOCHS) -> Path:
        path = tmp_path / f"{name}.toml"
        log = cycle_folder / "log.tsv"
        path.write_text(RUN.format(run_dir=tmp_path / name, log=log, epochs=epochs) + EVALUATE)
        return path

    return write


def _has_trained(run: Path) -> Callable[[], bool]:
    def has_step() -> bool:
        return any(int(path.name[-8:]) > 0 for path in run.glob("pretrain/checkpoints/step-*"))

    return has_step


def _metrics(run: Path) -> Any:
    return json.loads((run / "evaluate" / "result.json").read_text())


def _is_lost(code: int, errors: str, rank: int) -> bool:
    said = f"torchrec-pt: worker {rank} was killed by SIGKILL (out of memory?), the others"
    return code == 1 and errors.startswith(said) and LOST in errors and errors.count("\n") == 1


def test_a_worker_killed_in_training_ends_the_command_and_it_resumes(
    config: Config, tmp_path: Path
) -> None:
    killed = Command("run", config("killed"), "--workers", 2)
    killed.wait_for(_has_trained(tmp_path / "killed"))
    killed.kill(1)
    code, _, errors = killed.end(BOUND_S)
    assert _is_lost(code, errors, 1), errors
    code, output, errors = Command("run", config("killed"), "--workers", 2).end()
    assert (code, "resumed at epoch" in output) == (0, True), output + errors
    code, _, errors = Command("run", config("whole"), "--workers", 2).end()
    assert code == 0, errors
    assert _metrics(tmp_path / "killed") == _metrics(tmp_path / "whole")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(12))
def test_a_worker_killed_at_any_moment_ends_the_command_and_it_resumes(
    config: Config, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    rank = seed % 3
    killed = Command("run", config("killed"), "--workers", 3)
    killed.wait_for(lambda: len(killed.workers()) == 3)
    try:
        killed.process.wait(draw.uniform(0, 20))
    except subprocess.TimeoutExpired:
        if rank in killed.workers():
            killed.kill(rank)
            code, _, errors = killed.end(BOUND_S)
            assert _is_lost(code, errors, rank), errors
        else:
            killed.end()
    for name in ("killed", "whole"):
        code, _, errors = Command("run", config(name), "--workers", 3).end()
        assert code == 0, errors
    assert _metrics(tmp_path / "killed") == _metrics(tmp_path / "whole")


def test_the_survivor_under_torchrun_ends_with_at_most_one_line(
    config: Config, tmp_path: Path
) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    killed = Command("run", config(epochs=1000), launcher=torchrun)
    killed.wait_for(_has_trained(tmp_path / "run"))
    killed.kill(1)
    code, _, errors = killed.end(BOUND_S)
    assert code == 1
    # torchrun stops the survivor, often before it has noticed anything.
    ours = [line for line in errors.splitlines() if line.startswith("torchrec-pt:")]
    assert all(line.startswith("torchrec-pt: rank 0: lost another worker") for line in ours)
    assert len(ours) <= 1
    assert "gloo/transport" not in errors


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_worker_outlives_the_command(config: Config, name: str) -> None:
    stopped = Command("run", config(epochs=1000), "--workers", 2)
    stopped.wait_for(lambda: len(stopped.workers()) == 2)
    stopped.process.send_signal(signal.Signals[name])
    code, output, errors = stopped.end(BOUND_S)
    assert "Traceback" not in output + errors
    if name == "SIGKILL":
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + signal.Signals[name]
        assert errors.count("\n") == 1
        assert LOST in errors


def test_what_every_worker_meets_is_said_once(config: Config) -> None:
    rate = "--set=pretrain.learning_rate=1e30"
    code, _, errors = Command("run", config(), "--workers", 2, rate).end()
    assert (code, errors.count("\n")) == (1, 1), errors
    assert "loss is not finite at step" in errors


def test_a_mistake_that_every_rank_meets_is_said_once_under_torchrun(config: Config) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    _, _, errors = Command("prepare", config(), "--set=data.path=/no", launcher=torchrun).end()
    assert errors.count("torchrec-pt: data.path: /no does not exist; check the path") == 1, errors


def test_more_workers_inside_a_worker_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    code, _, errors = Command("prepare", config(), "--workers", 2).end()
    assert (code, errors.count("\n")) == (2, 1)
    assert "--workers: this process is a worker already" in errors


def _failure(exitcode: int, message: str = "", *, is_consequence: bool = False) -> Any:
    """As torchelastic gives it; with a message, of a worker that left its word."""
    said = {"exit_code": exitcode, "is_consequence": is_consequence} if message else {}
    name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    return SimpleNamespace(
        exitcode=exitcode, error_file_data=said, message=message, signal_name=lambda: name
    )


def test_the_verdict_names_the_cause_and_not_what_followed_from_it() -> None:
    lost = _failure(1, "lost another worker", is_consequence=True)
    stopped = _failure(-signal.SIGTERM)
    mistake = _failure(2, "data.path: does not exist")
    assert verdict({0: lost, 1: _failure(-signal.SIGKILL), 2: stopped})[0].startswith(
        "torchrec-pt: worker 1 was killed by SIGKILL"
    )
    assert verdict({0: lost, 2: stopped})[0].startswith("torchrec-pt: worker 2 was killed")
    assert verdict({0: lost, 1: mistake, 2: stopped}) == ("data.path: does not exist", 2)
    assert verdict({0: lost}) == ("lost another worker", 1)
    assert "worker 1 ended with exit code 7" in verdict({0: lost, 1: _failure(7)})[0]
