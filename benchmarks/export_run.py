"""The run that bench_export.py exports: an untrained model over as many items as asked for.

The library's own stages make it: preparation of a log in which each item is taken once, and a
pretraining of no steps, which leaves a checkpoint of the initial values.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch

from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig

DIM = 64
ITEMS_PER_USER = 5000  # validation takes longer the more users there are


def build_run(folder: Path, num_items: int) -> Path:
    """The run's folder, in `folder`."""
    folder.mkdir()
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(0)).numpy()
    log = pl.DataFrame({"item": order}).with_row_index("row")
    log.select(
        user_id=pl.format("user-{}", pl.col("row") // ITEMS_PER_USER),
        item_id=pl.format("item-{}", pl.col("item").cast(pl.String).str.zfill(9)),
        timestamp="row",
    ).write_parquet(folder / "log.parquet")
    config = RunConfig.model_validate(
        {
            "run_dir": folder / "run",
            "data": {
                "format": "parquet",
                "path": folder / "log.parquet",
                "columns": {"timestamp": "timestamp"},
            },
            "model": {
                "backbone": "transformer",
                "dim": DIM,
                "num_layers": 1,
                "item_table": {"placement": "replicated", "optimizer": "rowwise_adagrad"},
            },
            "pretrain": {"epochs": 0, "objectives": [{"name": "masked_item"}]},
        }
    )
    pipeline.prepare(config)
    pipeline.pretrain(config)
    return config.run_dir
