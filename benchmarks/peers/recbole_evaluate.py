#!/usr/bin/env python3
"""RecBole in bench_evaluate.py: its full evaluation of a fresh SASRec, of so many users a batch.

In RecBole's environment, with benchmarks/ on PYTHONPATH. The argument is a folder with an atomic
file of its name; a word is the number of users at a time. Defaults but for the length, 50.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from contestants import take_turns_asked
from recbole.data.utils import get_dataloader
from recbole_prepare import LEAVE_ONE_OUT
from recbole_trainer import build_trainer
from turn_costs import costs_of


def main() -> None:
    folder = Path(sys.argv.pop()).resolve()  # RecBole reads the command line, too
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as checkpoints:
        os.chdir(checkpoints)  # where RecBole leaves its logs
        trainer, train, _, test = build_trainer(
            "SASRec",
            folder,
            checkpoints,
            load_col={"inter": ["user_id", "item_id", "timestamp"]},
            MAX_ITEM_LIST_LENGTH=50,
            train_neg_sample_args=None,
            eval_args=LEAVE_ONE_OUT,
            metrics=["Hit", "NDCG", "MRR"],
            topk=[5, 10],
        )
        config = trainer.config

        def turn(batch_size: str) -> dict[str, Any]:
            config["eval_batch_size"] = int(batch_size)
            loader = get_dataloader(config, "test")(config, test._dataset, None, shuffle=False)
            costs = costs_of(lambda: trainer.evaluate(loader, load_best_model=False))
            return {"num": len(test._dataset), "num_batches": len(loader), **costs}

        ready = {
            "users": len(test._dataset),
            "items": train._dataset.item_num - 1,  # one of them is padding
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        }
        take_turns_asked(ready, turn)


if __name__ == "__main__":
    main()
