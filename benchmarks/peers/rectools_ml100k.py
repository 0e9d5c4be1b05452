#!/usr/bin/env python3
"""RecTools' BERT4Rec or SASRec on MovieLens-100K, leave-one-out by time, over the full catalogue.

    python benchmarks/peers/rectools_ml100k.py data/ml-100k/ml-100k.inter --model bert4rec --seed 0

Runs in an environment of its own: pip install torch==2.13.0 "numpy<2" scipy "pandas<3" tqdm
pytorch-lightning "attrs<24" "fastrlock<0.9" "pydantic<3" "typeguard<5", then with --no-deps
rectools==0.19.0 implicit==0.7.3. Split and candidates are those of torchrec_pt's evaluation: a
user's last interaction (ties in the file's order) is the test, its history includes the
validation item, and candidates are all items that the user did not take before.
"""

from __future__ import annotations

import argparse
import json
import time

import pandas as pd
import pytorch_lightning as lightning
from leave_one_out import K, metrics, read
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet

EPOCHS = {"bert4rec": 160, "sasrec": 140}


def with_time(rows: pd.DataFrame) -> pd.DataFrame:
    """In RecTools' columns."""
    return pd.DataFrame(
        {
            Columns.User: rows["user_id"],
            Columns.Item: rows["item_id"],
            Columns.Weight: 1.0,
            # Seconds tie: the order is the time.
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(rows.index, "s"),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inter")
    parser.add_argument("--model", choices=EPOCHS, default="bert4rec")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    epochs = arguments.epochs or EPOCHS[arguments.model]
    rows = read(arguments.inter)
    test = rows[rows["from_end"] == 0].set_index("user_id")["item_id"]
    train, known = (with_time(rows[rows["from_end"] >= n]) for n in (2, 1))

    lightning.seed_everything(arguments.seed, workers=True)
    build = BERT4RecModel if arguments.model == "bert4rec" else SASRecModel
    model = build(
        n_factors=64,
        n_blocks=2,
        n_heads=2,
        session_max_len=50,
        batch_size=128,
        loss="softmax",
        epochs=epochs,
        item_net_block_types=(IdEmbeddingsItemNet,),
        deterministic=True,
        verbose=0,
    )
    started = time.process_time()
    model.fit(Dataset.construct(train))
    seconds = time.process_time() - started
    # What training never saw is no candidate of RecTools; such a test item counts as missed.
    found = model.recommend(
        users=test.index.to_numpy(), dataset=Dataset.construct(known), k=K, filter_viewed=True
    )
    hits = found[found[Columns.Item].to_numpy() == test.loc[found[Columns.User]].to_numpy()]
    settings = {"model": arguments.model, "seed": arguments.seed, "epochs": epochs}
    reached = metrics(hits[Columns.Rank].to_numpy(), len(test))
    print(json.dumps({**settings, **reached, "cpu_seconds": round(seconds)}))


if __name__ == "__main__":
    main()
