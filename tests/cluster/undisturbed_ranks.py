"""Pretrains and evaluates a configuration on so many ranks, without Ray.

python undisturbed_ranks.py CONFIG.toml NUM_RANKS RUN_DIR
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing

from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config


def _work(rank: int, num_ranks: int, store: str, config: RunConfig) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    pipeline.prepare(config)
    pipeline.pretrain(config)
    pipeline.evaluate(config)
    dist.destroy_process_group()


def main(config: RunConfig, num_ranks: int) -> None:
    """Forks, since torch is slow to import."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _work, (num_ranks, f"{folder}/store", config), nprocs=num_ranks, start_method="fork"
        )


if __name__ == "__main__":
    main(load_config(sys.argv[1], [f"run_dir={sys.argv[3]}"]), int(sys.argv[2]))
