#!/usr/bin/env python3
"""A prepared MovieLens-100K as RecBole's benchmark files, so that peers train on the same split.

    .venv/bin/python benchmarks/peers/export_recbole.py runs/NAME/prepared /tmp/ctr-seed0

Writes TARGET/<name of TARGET>.train.inter, .valid.inter and .test.inter, with a column `label`
(rating of 4 or more), and .user and .item with the features that RecBole takes of ml-100k, each a
category as there. Runs in the environment of torchrec_pt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.splits import SPLIT_CODES

USER = {"age": "token", "gender": "token", "occupation": "token"}
ITEM = {"release_year": "token", "class": "token_seq"}


def entities(table: pl.DataFrame, of: str, kinds: dict[str, str]) -> pl.DataFrame:
    """Ids and features as text under RecBole's typed headers."""
    cells = [pl.col("external_id").cast(pl.String).alias(f"{of}_id:token")]
    for name, kind in kinds.items():
        column = pl.col(name)
        if kind == "token_seq":
            column = column.list.join(" ")
        elif table.schema[name].is_float():
            column = column.cast(pl.Int64).cast(pl.String)
        cells.append(column.alias(f"{name}:{kind}"))
    return table.select(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prepared", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--positive", type=float, default=4.0, help="ratings from here on are 1")
    arguments = parser.parse_args()
    dataset = PreparedDataset.load(arguments.prepared)
    arguments.target.mkdir(parents=True, exist_ok=True)

    def write(table: pl.DataFrame, suffix: str) -> None:
        path = arguments.target / f"{arguments.target.name}.{suffix}"
        table.write_csv(path, separator="\t", quote_style="never")

    users, items = dataset.users["external_id"], dataset.items["external_id"]
    assert dataset.rating is not None
    rows = pl.DataFrame(
        {
            "user_id:token": users[dataset.interactions.rows.numpy()],
            "item_id:token": items[dataset.interactions.values.numpy()],
            "label:float": (dataset.rating >= arguments.positive).int().numpy(),
            "split": dataset.split.numpy(),
        }
    )
    for name, code in SPLIT_CODES.items():
        write(rows.filter(split=code).drop("split"), f"{name}.inter")
    write(entities(dataset.users, "user", USER), "user")
    write(entities(dataset.items, "item", ITEM), "item")


if __name__ == "__main__":
    main()
