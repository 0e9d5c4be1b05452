"""Several Ray nodes on this machine, which nobody else can reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobSubmissionClient

from cluster.nodes import LocalCluster, Node

import psutil  # isort: skip - Ray brings it along

# A node that is lost is missed after 2 s instead of 15.
FAST = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


def processes(node: Node) -> list[psutil.Process]:
    launcher = psutil.Process(node.process.pid)
    return [launcher, *launcher.children(recursive=True)]


def alive() -> dict[str, float]:
    return {node["NodeID"]: node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"]}


def wait_until(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@ray.remote(num_cpus=1)
def where() -> str:
    return str(ray.get_runtime_context().get_node_id())


def test_nodes_run_work_listen_on_loopback_alone_and_are_killed_whole() -> None:
    with LocalCluster(num_nodes=2, cpus_per_node=1, environment=FAST) as nodes:
        started = [nodes.head, *nodes.workers]
        with ray.init(nodes.address, log_to_driver=False):
            assert alive() == {node.id: 1.0 for node in started}
            assert {*ray.get([where.remote() for _ in range(20)])} <= {*alive()}

            everything = [process for node in started for process in processes(node)]
            listening = [
                connection.laddr.ip.removeprefix("::ffff:")
                for process in everything
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ]
            assert len(listening) > len(started)
            assert {*listening} == {"127.0.0.1"}

            lost = nodes.workers[0]
            of_it = processes(lost)
            assert len(of_it) > 2  # with Ray's agents
            nodes.kill(lost)
            wait_until(lambda: not any(map(runs, of_it)))
            wait_until(lambda: lost.id not in alive())
            assert nodes.workers == []
            added = nodes.add(num_cpus=3)
            assert alive() == {nodes.head.id: 1.0, added.id: 3.0}
            everything += processes(added)
    wait_until(lambda: not any(map(runs, everything)))


def runs(process: psutil.Process) -> bool:
    """A zombie does not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_an_environment_that_ray_refuses_is_one_line_and_leaves_nothing() -> None:
    before = {*Path("/tmp").glob("ray-*")}
    broken = LocalCluster(environment={"PYTHONHOME": "/nowhere"})
    with pytest.raises(RuntimeError, match=r"^cluster.nodes: Ray did not start: .*$"), broken:
        raise AssertionError
    assert not {*Path("/tmp").glob("ray-*")} - before


@pytest.mark.soak
def test_clusters_live_side_by_side() -> None:
    with LocalCluster() as one, LocalCluster() as other:
        assert one.address != other.address
        assert one.dashboard != other.dashboard
        for nodes in (one, other):
            assert JobSubmissionClient(nodes.dashboard).list_jobs() == []
