"""Twenty kills at random moments, a lost head, a cut between two networks: minutes (make soak)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.nodes import NODE_PROCESS
from tests.cluster import faults
from tests.cluster.faults import Submitted
from tests.cluster.networks import ADDRESSES, HERE, THERE, ip, two_networks
from tests.cluster.test_faults import SAME

EPOCHS = 60
NUM_KILLS = 20
KILLS = {"worker": faults.kill_worker, "node": faults.kill_node, "driver": faults.kill_driver}


@pytest.mark.soak
def test_twenty_kills_at_random_moments_leave_every_run_as_it_would_have_been(
    tmp_path: Path, cycle_folder: Path
) -> None:
    """Anything may be under way: preparation, a step, a checkpoint, a restart, the evaluation."""
    draw = random.Random(0)
    with faults.cluster_of(num_workers=2) as cluster:
        config = faults.write_config(tmp_path / "0", cycle_folder / "log.tsv", epochs=EPOCHS)
        expected = {
            model: pytest.approx(values, **SAME)
            for model, values in faults.undisturbed(config, workers=2).items()
        }
        began = time.monotonic()
        with Submitted(config, cluster.dashboard) as job:
            assert job.end() == 0, job.output
        duration_s = time.monotonic() - began
        killed = dict.fromkeys(KILLS, 0)
        number = 0
        while sum(killed.values()) < NUM_KILLS:
            number += 1
            kind = draw.choice(list(KILLS))
            config = faults.write_config(
                tmp_path / str(number), cycle_folder / "log.tsv", epochs=EPOCHS
            )
            with Submitted(config, cluster.dashboard) as job:
                time.sleep(draw.uniform(0, duration_s))
                # It may not run yet, or no longer.
                with suppress(faults.NothingToKillError):
                    KILLS[kind](cluster, draw.choice)
                    killed[kind] += 1
                code = job.end()
            if code != 0:
                assert kind == "driver", job.output
                with Submitted(config, cluster.dashboard) as job:
                    assert job.end() == 0, job.output
            assert faults.metrics(job.run_dir) == expected, f"run {number}, {kind} killed"
        assert all(killed.values())


@pytest.mark.soak
def test_a_run_whose_whole_cluster_is_lost_goes_on_on_another(
    tmp_path: Path, cycle_folder: Path
) -> None:
    config = faults.write_config(tmp_path, cycle_folder / "log.tsv", epochs=EPOCHS)
    run_dir = tmp_path / "run"
    with (
        faults.cluster_of(num_workers=2) as cluster,
        Submitted(config, cluster.dashboard) as job,
    ):
        job.wait_for_step(4)
        # They rest, so that the run is not over before the head and all that Ray knew is gone.
        for worker in faults.train_workers(*(node.process.pid for node in cluster.workers)):
            worker.send_signal(signal.SIGSTOP)
        cluster.kill(cluster.head)
    with (
        faults.cluster_of(num_workers=2) as cluster,
        Submitted(config, cluster.dashboard) as again,
    ):
        assert again.end() == 0, again.output
        assert "pretrain: resumed at epoch" in again.output
    assert faults.metrics(run_dir) == {
        model: pytest.approx(values, **SAME)
        for model, values in faults.undisturbed(config, workers=2).items()
    }


# --- two networks -------------------------------------------------------------------------------


@contextmanager
def node_in(network: str, folder: Path, **given: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """A Ray node in a namespace: its process id, and what it says of itself."""
    parameters = {
        "node_ip_address": ADDRESSES[network],
        "temp_dir": str(folder / network),
        "object_store_memory": 128 * 2**20,
        "dashboard_port": 0,
        "dashboard_agent_listen_port": 0,
        "num_cpus": 1,
        **given,
    }
    with subprocess.Popen(
        [
            *("ip", "netns", "exec", network),
            *(sys.executable, "-I", NODE_PROCESS, json.dumps(parameters)),
        ],
        env={
            **os.environ,
            **faults.ENVIRONMENT,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # these nodes are not on loopback
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "cable",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process.pid, json.loads(process.stdout.readline())
        finally:
            process.kill()  # Ray's processes die with it


@pytest.mark.soak
def test_a_run_whose_network_is_cut_goes_on_beside_the_head_and_grows_back(
    tmp_path: Path, cycle_folder: Path, ray_folder: Path
) -> None:
    config = faults.write_config(tmp_path, cycle_folder / "log.tsv", epochs=120)
    run_dir = tmp_path / "run"
    with (
        two_networks(),
        node_in(HERE, ray_folder, include_dashboard=True) as (head, said),
        node_in(THERE, ray_folder, gcs_address=said["gcs_address"]),
        Submitted(
            *(config, f"http://{said['dashboard']}"),
            *("--workers", "1:2", "--resize-interval", "1", "--max-failures", "10"),
            prefix=("ip", "netns", "exec", HERE),
        ) as job,
    ):
        job.wait_for_step(4)
        assert faults.world_sizes(run_dir) == [2]
        ip("-n", HERE, "link", "set", "cable", "down")
        job.wait_for("one worker", lambda: faults.world_sizes(run_dir) == [2, 1])
        job.wait_for_step(faults.last_step(run_dir) + 1)
        (worker,) = faults.train_workers(head)
        worker.send_signal(signal.SIGSTOP)  # until there is a node again
        ip("-n", HERE, "link", "set", "cable", "up")
        with node_in(THERE, ray_folder, gcs_address=said["gcs_address"]):
            worker.send_signal(signal.SIGCONT)
            job.wait_for("two again", lambda: faults.world_sizes(run_dir) == [2, 1, 2])
            assert job.end() == 0, job.output
