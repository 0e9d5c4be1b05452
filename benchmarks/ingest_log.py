"""A log of interactions whose users and items are few often and many rarely."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch
from popularity import draw, zipf_counts

ROWS_PER_USER, ROWS_PER_ITEM = 50, 200


def write_log(folder: Path, num_rows: int, num_files: int, seed: int = 0) -> int:
    """CSV files of user_id, item_id, rating and timestamp (in order); their bytes together."""
    generator = torch.Generator().manual_seed(seed)
    users = zipf_counts(max(1, num_rows // ROWS_PER_USER), seed).sqrt()
    items = zipf_counts(max(1, num_rows // ROWS_PER_ITEM), seed + 1)
    folder.mkdir(parents=True)
    begin = 0
    for file in range(num_files):
        end = num_rows * (file + 1) // num_files
        num = end - begin
        frame = pl.DataFrame(
            {
                "user_id": draw(users, num, generator).numpy(),
                "item_id": draw(items, num, generator).numpy(),
                "rating": torch.randint(1, 6, (num,), generator=generator).numpy(),
                "timestamp": torch.arange(begin, end).numpy() + 1_600_000_000,
            }
        )
        frame.write_csv(folder / f"{file:02}.csv")
        begin = end
    return sum(path.stat().st_size for path in folder.iterdir())
