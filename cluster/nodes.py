"""A Ray cluster of several nodes on this machine: for `--local`, and for tests.

    with LocalCluster(num_nodes=2) as nodes:
        ray.init(nodes.address)

Nothing of it listens outside of loopback, every port is a free one, and what it writes lies in a
folder of its own, so that it meets no other Ray on the machine.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
NODE_PROCESS = str(Path(__file__).with_name("node_process.py"))
# Smaller than Ray's share of the memory (30 %): jobs of ours pass results, not data.
OBJECT_STORE_BYTES = 128 * 2**20
# Ray replaces a loopback address by one that the network reaches, and listens there, unless
# this says that the machine will never be in a cluster.
# A token of the user's, for other clusters, would be asked for by some of the processes and not be
# known to others.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}


@dataclass(frozen=True)
class Node:
    """Attributes:
    id: as `ray.nodes()` names it.
    process: all processes of the node descend from it.
    """

    id: str
    process: subprocess.Popen[str]


class LocalCluster:
    """Several Ray nodes on this machine.

    Attributes:
        address: for `ray.init`, in this process and in those with ENVIRONMENT.
        dashboard: http://127.0.0.1:PORT, with the Jobs API.
        head, workers: its nodes; drivers that do not run on a node connect to the head.
    """

    def __init__(
        self,
        *,
        num_nodes: int = 1,
        cpus_per_node: int | None = None,
        head_cpus: int | None = None,
        object_store_bytes: int = OBJECT_STORE_BYTES,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            num_nodes: with the head.
            cpus_per_node: what Ray takes a node to have; None: the machine's.
            head_cpus: in the place of cpus_per_node; 0: nothing that asks for a CPU runs there.
            environment: of every process of it, besides this one's.
        """
        self._num_nodes = num_nodes
        self._cpus = cpus_per_node or os.cpu_count() or 1
        self._head_cpus = self._cpus if head_cpus is None else head_cpus
        self._object_store_bytes = object_store_bytes
        self._environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._numbers = itertools.count()
        self._nodes: list[Node] = []
        self.workers: list[Node] = []

    def __enter__(self) -> LocalCluster:
        stay_on_loopback()
        # Not under TMPDIR: Ray's socket paths have 107 bytes in all.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        try:
            self.head, said = self._start(
                # Other nodes have no GPU: each would take all of the machine's for its own.
                {"num_cpus": self._head_cpus, "include_dashboard": True}
            )
            self.address: str = said["gcs_address"]
            self.dashboard = f"http://{said['dashboard']}"
            for _ in range(self._num_nodes - 1):
                self.add()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, num_cpus: int | None = None) -> Node:
        """A further node; it is alive when this returns."""
        cpus = self._cpus if num_cpus is None else num_cpus
        given = {"num_cpus": cpus, "num_gpus": 0, "gcs_address": self.address}
        node, _ = self._start({**given, "include_log_monitor": False})
        self.workers.append(node)
        return node

    def kill(self, node: Node) -> None:
        """As if its machine lost power: SIGKILL to every process of the node, workers too."""
        _kill_tree(node.process.pid)
        node.process.wait()
        self._nodes.remove(node)
        if node in self.workers:
            self.workers.remove(node)

    def _start(self, given: Mapping[str, Any]) -> tuple[Node, dict[str, Any]]:
        """
        Raises:
            RuntimeError: Ray did not start.
        """
        number = next(self._numbers)
        parameters = {
            "node_ip_address": LOOPBACK,
            # Of its own: in a common one each node unpacks a job's working directory anew, over
            # the one in which the others' processes stand.
            "temp_dir": str(self._folder / str(number)),
            "object_store_memory": self._object_store_bytes,
            "dashboard_port": 0,
            "dashboard_agent_listen_port": 0,
            **given,
        }
        log = self._folder / f"node-{number}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", NODE_PROCESS, json.dumps(parameters)],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for who submitted, not for the cluster
            )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"cluster.nodes: Ray did not start: {_last_line(log)}")
        except BaseException:
            _kill_tree(process.pid)
            process.wait()
            raise
        said = json.loads(line)
        node = Node(said["id"], process)
        self._nodes.append(node)
        return node, said

    def _close(self) -> None:
        for node in reversed(self._nodes):
            self.kill(node)
        shutil.rmtree(self._folder, ignore_errors=True)


def stay_on_loopback() -> None:
    """For Ray in this process and its children, whether it is imported already or not."""
    os.environ.update(ENVIRONMENT)
    if "ray" in sys.modules:
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = False


def _kill_tree(pid: int) -> None:
    """Parents are stopped before their children are listed, so that none is born meanwhile."""
    import ray  # noqa: F401 - brings psutil along
    import psutil  # type: ignore[import-untyped]  # isort: skip

    def stopped(process: psutil.Process) -> Iterator[psutil.Process]:
        process.send_signal(signal.SIGSTOP)
        yield process
        for child in process.children():
            try:
                yield from stopped(child)
            except psutil.NoSuchProcess:
                continue

    try:
        processes = list(stopped(psutil.Process(pid)))
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes[1:], timeout=10)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
