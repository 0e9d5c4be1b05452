#!/usr/bin/env python3
"""The demo as a job on a Ray cluster started here, which loses a node half way.

    python scripts/demo_ray.py [--set A.B=VALUE ...]        (`make demo-ray` is the same)

The cluster has a head and two nodes. Every stage trains on one worker; when half of pretraining
is done, the node that it runs on is killed with every process that it has, and the other node goes
on from the last checkpoint. One worker does what `make demo` does, so the table is the same; where
`make demo` has left its own, the two are compared to the last digit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from cluster.client import Asked, mistakes_of, submit
from cluster.job_file import JOB_FILE, JobFile
from cluster.nodes import LocalCluster, Node
from cluster.packing import ROOT, Code
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config

CONFIG = Path("configs/demo.toml")
RUN_DIR = Path("runs/demo-ray")
DEMO_DIR = Path("runs/demo")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    config = load_config(CONFIG, [*parser.parse_args().overrides, f"run_dir={RUN_DIR}"])
    shutil.rmtree(RUN_DIR, ignore_errors=True)  # nothing is half way in what is done already
    with cluster() as nodes:
        threading.Thread(target=lose_a_node, args=(nodes, config), daemon=True).start()
        code = submit(nodes.dashboard, asked(config), Code.image, is_followed=True)
    return code or compare(config)


def cluster() -> LocalCluster:
    """Nodes by this interpreter, on these sources; each may use the whole machine, as the demo."""
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # A lost node is noticed after two seconds, not after half a minute.
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    return LocalCluster(num_nodes=3, head_cpus=0, environment=environment)


def asked(config: RunConfig) -> Asked:
    job = JobFile(
        name="demo-ray",
        config=config.model_dump(mode="json"),
        folder=Path.cwd(),
        min_workers=1,
        max_workers=1,
    )
    return Asked("cluster.entry", JOB_FILE, job)


def lose_a_node(nodes: LocalCluster, config: RunConfig) -> None:
    """Once half of pretraining is done, kill what it runs on."""
    assert config.pretrain is not None
    half = config.pretrain.epochs // 2
    while epochs_done(config) < half:
        time.sleep(0.1)
    node = training_node(nodes)
    print(f"demo-ray: pretraining is half way; killing node {node.id[:8]}", flush=True)
    nodes.kill(node)


def epochs_done(config: RunConfig) -> int:
    try:
        lines = (config.run_dir / "logs/pretrain-0.jsonl").read_text().splitlines()
        return max(json.loads(line).get("epoch", 0) for line in lines)
    except (OSError, ValueError):  # no file or no whole line yet
        return 0


def training_node(nodes: LocalCluster) -> Node:
    from ray.util.state import list_actors

    alive = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    (worker,) = list_actors(nodes.dashboard, filters=alive, detail=True)
    (node,) = (node for node in nodes.workers if node.id == worker.node_id)
    return node


def compare(config: RunConfig) -> int:
    """1 where `make demo` has other figures for the same configuration."""
    try:
        figures = json.loads((DEMO_DIR / "evaluate/result.json").read_text())
        of = RunConfig.model_validate_json((DEMO_DIR / "config.json").read_text())
    except OSError:
        print(f"demo-ray: no {DEMO_DIR} to compare with; `make demo` gives the same table")
        return 0
    if of.model_copy(update={"run_dir": RUN_DIR}) != config:
        print(f"demo-ray: {DEMO_DIR} is of another configuration, so nothing is compared")
        return 0
    if json.loads((RUN_DIR / "evaluate/result.json").read_text()) != figures:
        print(f"demo-ray: the figures are not those of {DEMO_DIR}", file=sys.stderr)
        return 1
    print(f"demo-ray: every figure is that of {DEMO_DIR}, to the last digit")
    return 0


if __name__ == "__main__":
    with mistakes_of("demo-ray"):
        sys.exit(main())
