"""What rayjob.yaml has KubeRay run, run as processes in two networks: minutes (make soak)."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.packing import ROOT
from tests.cluster import faults
from tests.cluster.networks import ADDRESSES, HERE, THERE, two_networks

START_S = 120


@contextmanager
def ray_node(
    network: str, folder: Path, parameters: Mapping[str, Any], env: dict[str, str]
) -> Iterator[None]:
    """`ray start`, as KubeRay writes it of rayStartParams, until the end of the block.

    Args:
        folder: its /tmp/ray, as pods have one each: nodes that share it remove each other's files.
    """
    (folder / network).mkdir(parents=True)
    options = [f"--{k}" if value is True else f"--{k}={value}" for k, value in parameters.items()]
    own_folder = 'mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && exec "$@"'
    with subprocess.Popen(
        [
            *("ip", "netns", "exec", network),
            *("unshare", "--mount", "sh", "-c", own_folder, str(folder / network)),
            *(str(Path(sys.executable).with_name("ray")), "start", *options),
            *(f"--node-ip-address={ADDRESSES[network]}", "--block"),
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield
        finally:
            process.terminate()  # which stops what it started


@pytest.mark.soak
def test_the_rayjobs_entrypoint_trains_on_nodes_started_with_its_parameters_and_a_token(
    tmp_path: Path, cycle_folder: Path, ray_folder: Path
) -> None:
    """With --device cpu for lack of a GPU, and the configuration where it lies."""
    spec = yaml.safe_load((ROOT / "cluster/kubernetes/rayjob.yaml").read_text())["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    config = faults.write_config(tmp_path, cycle_folder / "log.tsv", epochs=4)
    token = tmp_path / "token"
    token.write_text("a-token-of-kuberay")
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": "cable",
        "PYTHONPATH": str(ROOT),  # in the place of the image's installed package
    }
    head = spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    worker = spec["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"]
    entrypoint = shlex.split(spec["entrypoint"])
    entrypoint[0] = sys.executable
    entrypoint[entrypoint.index("/etc/torchrec_pt/run.toml")] = str(config)
    entrypoint[entrypoint.index("cuda")] = "cpu"
    memory = {"object-store-memory": 128 * 2**20}
    with (
        two_networks(),
        ray_node(HERE, ray_folder, {"head": True, "port": 6379, **head, **memory}, env),
        ray_node(
            THERE,
            ray_folder,
            {"address": f"{ADDRESSES[HERE]}:6379", "num-cpus": 2, **worker, **memory},
            env,
        ),
    ):
        wait_for_two_nodes(env)
        outcome = subprocess.run(
            ["ip", "netns", "exec", HERE, *entrypoint],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
        )
        (tmp_path / "output.txt").write_text(outcome.stdout)
        without = {name: value for name, value in env.items() if "AUTH" not in name}
        refused = subprocess.run(
            ["ip", "netns", "exec", HERE, *entrypoint],
            env={**without, "RAY_AUTH_MODE": "disabled"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert faults.metrics(tmp_path / "run")
    assert refused.returncode == 2
    assert "token" in refused.stderr


def wait_for_two_nodes(env: dict[str, str]) -> None:
    """Until `ray status` of the head counts both."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = ["ip", "netns", "exec", HERE, ray, "status", f"--address={ADDRESSES[HERE]}:6379"]
    end = time.monotonic() + START_S
    said = ""
    while time.monotonic() < end:
        said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout
        if said.count("1 node_") == 2:
            return
        time.sleep(1)
    pytest.fail(f"the nodes did not come: {said}")
