"""Ours in bench_ctr.py: epochs of the ctr task on MovieLens-100K, a model a word.

As a program it prepares the data in the folder of its argument, says how large the models are, and
takes turns of EPOCHS_A_TURN epochs; of a user's labels a third is asked in an epoch, so that this
is once each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from conditions import ROOT
from contestants import take_turns_asked
from epochs import Epochs

from torchrec_pt import pipeline
from torchrec_pt.build import build_task
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks

EPOCHS_A_TURN = 3
DCN_V2 = "DCN-v2, float32"
# The configuration, and what else is set.
MODELS = {
    DCN_V2: ("benchmarks/ctr.toml", ()),
    "DCN-v2, bf16": ("benchmarks/ctr.toml", ("finetune.ctr.precision=bf16",)),
    "cross, default MLP": ("benchmarks/ctr.toml", ("finetune.ctr.hidden_dims=[128, 64]",)),
    "recipe": ("configs/ml100k_ctr.toml", ()),
}


class Training:
    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        train = config.finetune.ctr
        assert train is not None
        dataset = PreparedDataset.load(config.prepared_dir)
        task = build_task(config, "ctr", dataset)
        self.epochs = Epochs(
            config, train, [task], dataset, ranks, name="ctr", with_impressions=True
        )
        drawn = (task.draw(rows) for rows in self.epochs.loader.steps(epoch=0))
        self.num_pairs = sum(len(draw.tensors["label"]) for draw in drawn)  # of every epoch

    def turn(self) -> dict[str, Any]:
        return self.epochs.turn(EPOCHS_A_TURN, self.num_pairs)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    trainings = {}
    with joined_ranks() as ranks:
        for name, (path, others) in MODELS.items():
            run_dir = folder / Path(path).stem
            places = (f"run_dir={run_dir}", f"data.path={ROOT / 'data/ml-100k'}")
            config = load_config(ROOT / path, (*places, *others))
            pipeline.prepare(config)
            trainings[name] = Training(config, ranks)
        sizes = {
            name: {
                "parameters": training.epochs.num_parameters,
                "pairs_an_epoch": training.num_pairs,
                "batches_an_epoch": training.epochs.loader.steps_per_epoch,
            }
            for name, training in trainings.items()
        }
        take_turns_asked({"models": sizes}, lambda word: trainings[word].turn())


if __name__ == "__main__":
    main()
