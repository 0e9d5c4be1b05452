#!/usr/bin/env python3
"""RecBole in bench_ctr.py: an epoch of its DCN-v2 a turn, on what export_recbole.py wrote.

In RecBole's environment, with benchmarks/ on PYTHONPATH.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path

import torch
from contestants import take_turns_asked
from recbole_ctr import build_ctr_trainer
from turn_costs import costs_of


def main() -> None:
    folder = Path(sys.argv.pop()).resolve()  # RecBole reads the command line, too
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as checkpoints:
        os.chdir(checkpoints)  # where RecBole leaves its logs
        trainer, train, *_ = build_ctr_trainer(folder, "DCNV2", 0, checkpoints)
        epochs = itertools.count()
        ready = {
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "pairs_an_epoch": len(train.dataset),
            "batches_an_epoch": len(train),
        }
        take_turns_asked(
            ready,
            lambda _: {
                "num": len(train.dataset),
                **costs_of(lambda: trainer._train_epoch(train, next(epochs))),
            },
        )


if __name__ == "__main__":
    main()
