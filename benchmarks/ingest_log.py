"""A log of interactions: sessions of users and items that are few often and many rarely.

It is made and written a block at a time, so a log may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import torch
from popularity import draw, zipf_counts

ROWS_PER_USER, ROWS_PER_ITEM = 20, 50
ROWS_PER_SESSION = 8
SECONDS_BETWEEN_ROWS = 60  # of a session
SECONDS_PER_BLOCK = 86_400
ROWS_PER_BLOCK = 1_000_000
# RecBole names the types in the header.
INTER_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def write_log(folder: Path, num_rows: int, num_files: int, seed: int = 0) -> int:
    """CSV files of user_id, item_id, rating and timestamp; their bytes together."""
    folder.mkdir(parents=True)
    blocks = draw_log(num_rows, -(-num_rows // num_files), seed)
    for number, block in enumerate(blocks):
        block.write_csv(folder / f"{number:02}.csv")
    return sum(path.stat().st_size for path in folder.iterdir())


def write_inter(path: Path, num_rows: int, seed: int = 0) -> int:
    """The same columns as an atomic file of RecBole; its bytes."""
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(INTER_HEADER.encode())
        for block in draw_log(num_rows, ROWS_PER_BLOCK, seed):
            block.write_csv(file, separator="\t", include_header=False)
    return path.stat().st_size


def write_parquet(path: Path, num_rows: int, seed: int = 0) -> int:
    """The same columns as Parquet, a row group a block; its bytes."""
    path.parent.mkdir(parents=True)
    schema = next(draw_log(1, 1, seed)).to_arrow().schema
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for block in draw_log(num_rows, ROWS_PER_BLOCK, seed):
            writer.write_table(block.to_arrow())
    return path.stat().st_size


def draw_log(num_rows: int, rows_per_block: int, seed: int) -> Iterator[pl.DataFrame]:
    """Blocks of user_id, item_id, rating and timestamp: a day each, sorted by time.

    Users draw by the square root of a power law, items by the law itself; a session is some rows of
    one user, a minute between two of them in the mean.
    """
    generator = torch.Generator().manual_seed(seed)
    users = zipf_counts(max(1, num_rows // ROWS_PER_USER), seed).sqrt()
    items = zipf_counts(max(1, num_rows // ROWS_PER_ITEM), seed + 1)
    for day, begin in enumerate(range(0, num_rows, rows_per_block)):
        num = min(rows_per_block, num_rows - begin)
        # A row begins a session with a probability that makes them as long as said.
        begins = torch.rand(num, generator=generator) < 1 / ROWS_PER_SESSION
        begins[0] = True
        session = begins.cumsum(0) - 1
        num_sessions = int(session[-1]) + 1
        gaps = torch.rand(num, generator=generator).log_() * -SECONDS_BETWEEN_ROWS
        since = gaps.double().cumsum(0)
        starts = torch.rand(num_sessions, generator=generator).double() * SECONDS_PER_BLOCK
        time = starts[session] + since - since[begins][session]
        frame = pl.DataFrame(
            {
                "user_id": draw(users, num_sessions, generator)[session].numpy(),
                "item_id": draw(items, num, generator).numpy(),
                "rating": torch.randint(1, 6, (num,), generator=generator).numpy(),
                "timestamp": (time.long() + 1_600_000_000 + day * SECONDS_PER_BLOCK).numpy(),
            }
        )
        yield frame.sort("timestamp", maintain_order=True)
