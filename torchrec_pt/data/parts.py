"""How a prepared dataset is cut into the parts that ranks share out among themselves.

The cut does not depend on the number of ranks, so whatever goes by parts (the order of training,
the blocks of an evaluation) comes out the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_pt.data.manifest import Part

# Both are divided by the usual numbers of ranks. A part has 512 users or more where it can.
FEWEST_PARTS, MOST_PARTS = 12, 192
USERS_PER_PART = 512


def cut_parts(users: pl.DataFrame) -> tuple[Part, ...]:
    """Parts of equally many users: of those who train, then of those who do not.

    Args:
        users: by dense id: `num_rows`, `trains`, and `count`, of what they took in training.
    """
    num_training = int(users["trains"].sum())
    num_parts = FEWEST_PARTS
    while num_parts < MOST_PARTS and num_training >= 2 * num_parts * USERS_PER_PART:
        num_parts *= 2
    training, others = users.head(num_training), users.slice(num_training)
    return tuple(
        Part(
            num_users=part.height,
            num_rows=int(part["num_rows"].sum()),
            num_training=int(part["trains"].sum()),
            num_taking=int((part["count"] > 0).sum()),
        )
        for some in (training, others)
        for part in _equal_cuts(some, num_parts)
        if part.height
    )


def _equal_cuts(users: pl.DataFrame, num_parts: int) -> list[pl.DataFrame]:
    ends = [users.height * part // num_parts for part in range(num_parts + 1)]
    return [users.slice(begin, end - begin) for begin, end in pairwise(ends)]


def write_row_groups(path: Path, groups: Iterable[pl.DataFrame]) -> None:
    """A Parquet file with one row group for each of `groups`, of which there is at least one.

    The file's bytes depend on the rows alone, however they lay in memory.
    """
    writer = None
    try:
        for group in groups:
            # Not by polars itself, which may call a full disk "Invalid thrift".
            table = group.rechunk().to_arrow()
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=max(table.num_rows, 1))
    finally:
        if writer is not None:
            writer.close()


def cut(table: pl.DataFrame, heights: Iterable[int]) -> Iterator[pl.DataFrame]:
    """Consecutive rows; `heights` sum to the table's."""
    begin = 0
    for height in heights:
        yield table.slice(begin, height)
        begin += height


def read_row_groups(path: Path, groups: Sequence[int]) -> pl.DataFrame:
    """Some of a Parquet file's row groups, one after the other.

    Raises:
        OSError, pa.ArrowException: a file that is no Parquet, or has no such row group.
    """
    with pq.ParquetFile(path) as file:
        if not groups:
            return pl.DataFrame(pl.from_arrow(file.schema_arrow.empty_table()))
        if max(groups) >= file.num_row_groups:
            raise pa.ArrowInvalid(f"{file.num_row_groups} row groups, expected {max(groups) + 1}")
        return pl.DataFrame(pl.from_arrow(file.read_row_groups(list(groups))))
