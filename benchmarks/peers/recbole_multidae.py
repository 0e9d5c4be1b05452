#!/usr/bin/env python3
"""RecBole in bench_multidae.py: epochs of its MultiDAE, of 100 users a batch, a turn.

In RecBole's environment, with benchmarks/ on PYTHONPATH. The arguments are a folder with an atomic
file of its name, and the epochs of a turn. Defaults but for the batch.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path

import torch
from contestants import take_turns_asked
from recbole_prepare import LEAVE_ONE_OUT
from recbole_trainer import build_trainer
from turn_costs import costs_of


def main() -> None:
    num_epochs, folder = int(sys.argv.pop()), Path(sys.argv.pop()).resolve()  # RecBole reads it
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as checkpoints:
        os.chdir(checkpoints)  # where RecBole leaves its logs
        trainer, train, *_ = build_trainer(
            "MultiDAE",
            folder,
            checkpoints,
            load_col={"inter": ["user_id", "item_id", "timestamp"]},
            train_neg_sample_args=None,
            train_batch_size=100,
            eval_args=LEAVE_ONE_OUT,
        )
        num_users, epochs = train.dataset.user_num - 1, itertools.count()  # one is padding

        def some_epochs() -> None:
            for _ in range(num_epochs):
                trainer._train_epoch(train, next(epochs))

        ready = {
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "users": num_users,
            "batches_an_epoch": len(train),
        }
        take_turns_asked(ready, lambda _: {"num": num_epochs * num_users, **costs_of(some_epochs)})


if __name__ == "__main__":
    main()
