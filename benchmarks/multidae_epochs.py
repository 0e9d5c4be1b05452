"""Ours in bench_multidae.py: EPOCHS_A_TURN epochs of the autoencoder of benchmarks/multidae.toml.

As a program it prepares the data in the folder of its argument and takes turns.
"""

from __future__ import annotations

import sys

import torch
from conditions import ROOT
from contestants import take_turns_asked
from epochs import Epochs

from torchrec_pt import pipeline
from torchrec_pt.config_file import load_config
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.objectives.build import build_objectives

EPOCHS_A_TURN = 10


def main() -> None:
    torch.set_num_threads(1)
    places = (f"run_dir={sys.argv[1]}", f"data.path={ROOT / 'data/ml-100k'}")
    config = load_config(ROOT / "benchmarks/multidae.toml", places)
    assert config.pretrain is not None
    pipeline.prepare(config)
    dataset = PreparedDataset.load(config.prepared_dir)
    with joined_ranks() as ranks:
        objectives = build_objectives(config, dataset)
        epochs = Epochs(config, config.pretrain, objectives, dataset, ranks, name="pretrain")
        num_users = epochs.loader.num_users
        ready = {
            "parameters": epochs.num_parameters,
            "users": num_users,
            "batches_an_epoch": epochs.loader.steps_per_epoch,
        }
        take_turns_asked(ready, lambda _: epochs.turn(EPOCHS_A_TURN, num_users))


if __name__ == "__main__":
    main()
