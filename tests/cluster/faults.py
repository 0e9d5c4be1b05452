"""A tiny run on a cluster of this machine, and kill -9 for whatever it is made of.

A moment to kill at is never a time: it is what the run's log or its checkpoints say.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray  # noqa: F401 - brings psutil along

import psutil  # isort: skip

from cluster.nodes import LocalCluster
from cluster.packing import ROOT
from tests.conftest import RUN
from torchrec_pt import checkpoint

CONFIG = f"""\
{RUN}warmup_steps = 0

[evaluate]
ks = [10]
baselines = ["popularity"]
"""
# What a loaded machine may take for a step of a test; nothing waits for it where all is well.
PATIENCE_S = 300
# A node is missed after two seconds instead of half a minute.
ENVIRONMENT = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # Ray Train may ask for as many workers as before while a node is not missed yet; so long it
    # waits for them (a minute otherwise) until it asks again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": str(ROOT),
}


def write_config(folder: Path, data: Path, *, epochs: int) -> Path:
    """A configuration of pretraining whose every epoch is validated and saved; its data beside."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.tsv").symlink_to(data)
    path = folder / "run.toml"
    path.write_text(CONFIG.format(run_dir=folder / "run", log=folder / "log.tsv", epochs=epochs))
    return path


def cluster_of(num_workers: int) -> LocalCluster:
    """A head that runs jobs' drivers alone, and nodes for one worker each."""
    return LocalCluster(
        num_nodes=1 + num_workers, cpus_per_node=1, head_cpus=0, environment=ENVIRONMENT
    )


# --- a run --------------------------------------------------------------------------------------


class Submitted:
    """`python -m cluster.submit CONFIG --follow` in a process of its own.

    A context manager: leaving it ends the process, and with it nothing but the view of the job.
    """

    def __init__(
        self, config: Path, address: str, *options: str, prefix: Sequence[str] = ()
    ) -> None:
        """`prefix`: words of a command that runs this one."""
        self.run_dir = config.parent / "run"
        self._output = config.with_name(f"output-{time.monotonic_ns()}.txt")
        command = [sys.executable, "-m", "cluster.submit", str(config), "--address", address]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [*prefix, *command, "--follow", "--code", "image", *options],
                env={**os.environ, **ENVIRONMENT},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Submitted:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def output(self) -> str:
        return self._output.read_text()

    def end(self) -> int:
        """The exit code, once the job has ended."""
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job does not end:\n{self.output}") from None

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        """Until it holds; a job that ends before fails the test."""
        ends_at = time.monotonic() + PATIENCE_S
        while not condition():
            assert self._process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < ends_at, f"waited in vain for {what}:\n{self.output}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until pretraining has a checkpoint of this step or a later one."""
        self.wait_for(f"step {step}", lambda: last_step(self.run_dir) >= step)


def last_step(run_dir: Path) -> int:
    """Of pretraining's newest checkpoint; -1 without one."""
    saved = checkpoint.saved(run_dir / "pretrain/checkpoints")
    whole = [path for path in saved if (path / checkpoint.MARK).is_file()]
    return int(whole[-1].name.removeprefix("step-")) if whole else -1


def logged(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The lines of pretraining's first rank that tell of such an event."""
    try:
        lines = (run_dir / "logs/pretrain-0.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    told = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in told if line["event"] == event]


def world_sizes(run_dir: Path) -> list[int]:
    """How many workers pretraining had, from start to start, each change once."""
    started = [line["num_workers"] for line in logged(run_dir, "started")]
    return [size for size, _ in itertools.groupby(started)]


def metrics(run_dir: Path) -> dict[str, dict[str, float]]:
    """Model -> metric -> value on the test split."""
    result = json.loads((run_dir / "evaluate/result.json").read_text())
    return dict(result["ranking"]["metrics"])


def undisturbed(config: Path, *, workers: int) -> dict[str, dict[str, float]]:
    """The metrics of the same run without Ray, and without anything that is killed."""
    folder = config.parent / "undisturbed"
    script = Path(__file__).with_name("undisturbed_ranks.py")
    subprocess.run(
        [sys.executable, script, config, str(workers), folder],
        env={**os.environ, **ENVIRONMENT},
        check=True,
        timeout=PATIENCE_S,
    )
    return metrics(folder)


# --- what it is made of -------------------------------------------------------------------------


class NothingToKillError(Exception):
    """Nothing of that kind runs at this moment."""


Choose = Callable[[Sequence[Any]], Any]


def train_workers(*nodes: int) -> list[psutil.Process]:
    """The processes that train, of the nodes with these process ids."""
    return _named(nodes, "^ray::.*RayTrainWorker")


def kill_worker(cluster: LocalCluster, choose: Choose) -> None:
    _kill(choose, train_workers(*(node.process.pid for node in cluster.workers)))


def kill_node(cluster: LocalCluster, choose: Choose) -> None:
    """Any but the head; another one takes its place."""
    cluster.kill(choose(cluster.workers))
    cluster.add()


def kill_driver(cluster: LocalCluster, choose: Choose) -> None:
    _kill(choose, _named([cluster.head.process.pid], r"^\S*python\S* -m cluster\.entry"))


def _named(nodes: Iterable[int], pattern: str) -> list[psutil.Process]:
    """All that descend from the nodes' processes and whose command lines match."""
    found = []
    for node in nodes:
        for process in psutil.Process(node).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                if re.search(pattern, " ".join(process.cmdline())):
                    found.append(process)
    return found


def _kill(choose: Choose, processes: Sequence[psutil.Process]) -> None:
    """
    Raises:
        NothingToKillError: there is none, or no longer.
    """
    try:
        choose(processes).send_signal(signal.SIGKILL)
    except (IndexError, psutil.NoSuchProcess):
        raise NothingToKillError from None
