#!/usr/bin/env python3
"""RecTools' SASRec on a leave-one-out split: seconds an epoch and, if asked, what it reaches when.

    build/peers/rectools/bin/python benchmarks/peers/rectools_sasrec.py FILE.inter --epochs 3

FILE.inter holds user and item (and perhaps timestamp) with a header, tab-separated; without times
its order is the time. Of each user the last interaction is left out, the one before it validates.
Two blocks, two heads, dim 64, the newest 50 items, softmax over the catalogue at every position.
Prints lines of JSON: the number of `sequences` of an epoch, then of each epoch `seconds` and
`cpu_seconds` of its training alone, and with --validate `ndcg@10` over the catalogue without what
the user has taken, and `at`, seconds since training began, validations in it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as lightning
import torch
from leave_one_out import K, metrics, read
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools_ml100k import with_time


class Watch(lightning.Callback):
    """Times each epoch's training and, with the validation items, ranks them after it.

    Args:
        dataset: what is trained on.
        target: external id of each user's validation item, by external user id; None for none.
    """

    def __init__(self, dataset: Dataset, target: pd.Series | None) -> None:
        self.dataset = dataset
        self.target = target
        self._started = self._began = self._began_cpu = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._started = time.monotonic()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._began, self._began_cpu = time.monotonic(), time.process_time()

    def on_train_epoch_end(self, _: lightning.Trainer, module: Any) -> None:
        epoch = {
            "seconds": time.monotonic() - self._began,
            "cpu_seconds": time.process_time() - self._began_cpu,
        }
        if self.target is not None:
            epoch["ndcg@10"] = self._ndcg(module)
            module.train()
        print(json.dumps({**epoch, "at": time.monotonic() - self._started}), flush=True)

    @torch.no_grad()
    def _ndcg(self, module: Any) -> float:
        """As RecTools recommends: the newest items of a history in, what was taken out."""
        assert self.target is not None
        module.eval()
        preparator, model = module.data_preparator, module.torch_model
        dataset = preparator.transform_dataset_u2i(self.dataset, self.target.index.to_numpy())
        seen = dataset.get_user_item_matrix(include_weights=False)
        items = pd.Series(
            np.arange(preparator.item_id_map.size), index=preparator.item_id_map.external_ids
        )
        # What training never saw is no candidate of RecTools; such an item counts as missed.
        wanted = items.reindex(self.target.loc[dataset.user_id_map.external_ids])
        target = wanted.fillna(-1).to_numpy(dtype=np.int64)
        item_vectors = model.item_model.get_all_embeddings()
        hits, begin = [], 0
        for batch in preparator.get_dataloader_recommend(dataset, 512):
            scores = (model.encode_sessions(batch, item_vectors)[:, -1] @ item_vectors.T).numpy()
            block = slice(begin, begin + len(scores))
            scores[:, : preparator.n_item_extra_tokens] = -np.inf
            scores[seen[block].nonzero()] = -np.inf
            own = scores[np.arange(len(scores)), target[block]]
            rank = 1 + (scores > own[:, None]).sum(1)
            is_hit = (target[block] >= 0) & (rank <= K)
            hits.append(rank[is_hit])
            begin += len(scores)
        return metrics(np.concatenate(hits), len(target))["ndcg@10"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inter")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, help="of an epoch, instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true")
    arguments = parser.parse_args()
    rows = read(arguments.inter)
    valid = rows[rows["from_end"] == 1].set_index("user_id")["item_id"]
    rows = with_time(rows[rows["from_end"] >= 2])
    train, lengths = Dataset.construct(rows), rows.groupby(Columns.User).size()
    num_sequences = int((lengths >= 2).sum())
    if arguments.steps:
        num_sequences = min(num_sequences, arguments.steps * arguments.batch_size)
    print(json.dumps({"sequences": num_sequences}), flush=True)
    target = valid.loc[valid.index.isin(lengths.index)] if arguments.validate else None
    lightning.seed_everything(arguments.seed, workers=True)

    def trainer() -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=arguments.epochs,
            limit_train_batches=arguments.steps,
            deterministic=True,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Watch(train, target)],
        )

    model = SASRecModel(
        n_factors=64,
        n_blocks=2,
        n_heads=2,
        session_max_len=50,
        batch_size=arguments.batch_size,
        loss="softmax",
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=trainer,
    )
    model.fit(train)


if __name__ == "__main__":
    main()
