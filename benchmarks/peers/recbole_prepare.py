#!/usr/bin/env python3
"""RecBole's preparation of an atomic file, all that comes before training: its time and memory.

    build/peers/recbole/bin/python benchmarks/peers/recbole_prepare.py LOG/LOG.inter

In RecBole's environment, with benchmarks/ on PYTHONPATH. It reads users, items and times, splits
by leave-one-out in the order of time, and makes what SASRec trains on: a row for each prefix of a
history, of 50 items at most, as RecBole does for all of its sequential models before the first
step. Prints a line of JSON; the time leaves out the imports.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import init_seed
from turn_costs import MIB, status_bytes

LEAVE_ONE_OUT = {
    "split": {"LS": "valid_and_test"},
    "order": "TO",
    "group_by": "user",
    "mode": "full",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="a .inter file in a folder of its name")
    log = parser.parse_args().log.resolve()
    with tempfile.TemporaryDirectory() as checkpoints:
        settings = {
            "data_path": str(log.parent.parent),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": LEAVE_ONE_OUT,
            "train_neg_sample_args": None,
            "checkpoint_dir": checkpoints,
            "use_gpu": False,
        }
        config = Config("SASRec", log.parent.name, config_dict=settings)
        init_seed(config["seed"], config["reproducibility"])
        idle = status_bytes("VmHWM")
        started, cpu_started = time.perf_counter(), time.process_time()
        data_preparation(config, create_dataset(config))
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    found = {
        "wall_s": round(wall_s, 3),
        "cpu_s": round(cpu_s, 3),
        "peak_mib": round(status_bytes("VmHWM") / MIB, 1),
        "idle_mib": round(idle / MIB, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
