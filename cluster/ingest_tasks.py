"""What the tasks of `ingest` do: each looks at one block of the raw log, or at one partition.

A partition holds all rows of some users, so whatever a rule says of a user is decided inside it.
What goes from one pass to the next lies in a folder that every node sees:

    blocks/<first row>.parquet     rows of the log, one row group for each partition
    kept/<p>.parquet               a partition, filtered but for the k-core
    item_rows/, rows/, draws/      of a partition: rows of each item; place in the raw files of
                                   each row; their places in a random order
    alive.parquet                  items with enough rows, as far as is known
    split/, users/, items/         a partition with its splits, and whom it is of
    dense_users.parquet, dense_items.parquet
    numbered/<p>.parquet           the final rows, one row group for each part of the dataset
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_pt.config import Feature, Filters, Split
from torchrec_pt.data.errors import reading
from torchrec_pt.data.features import typed_feature
from torchrec_pt.data.filters import Heights, filter_rows
from torchrec_pt.data.manifest import Part
from torchrec_pt.data.numbering import entities, renumber
from torchrec_pt.data.parts import cut, read_row_groups, write_row_groups
from torchrec_pt.data.splits import (
    RowCounts,
    count_rows,
    is_drawn,
    split_rows,
    time_order,
    unknown_splits,
)
from torchrec_pt.files import whole_file


@dataclass(frozen=True)
class Scratch:
    """Attributes:
    folder: absolute.
    """

    folder: Path
    num_partitions: int

    def of(self, pass_name: str, partition: int) -> Path:
        return self.folder / pass_name / f"{partition}.parquet"

    @property
    def alive(self) -> Path:
        return self.folder / "alive.parquet"

    def dense(self, of: str) -> Path:
        return self.folder / f"dense_{of}s.parquet"


# --- blocks of the raw log ----------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Reads files of the log in blocks.

    Attributes:
        path, sources: of the configuration, for messages.
        working_dir: relative paths are taken from here; None where there are none.
    """

    path: Path
    sources: tuple[Path, ...]
    working_dir: Path | None
    rows_per_block: int

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Args:
        batch: `file`, pickled lazy frames of `RawData.files`.
        """
        if self.working_dir is not None:
            os.chdir(self.working_dir)
        for pickled in batch["file"].to_pylist():
            file: pl.LazyFrame = pickle.loads(pickled)
            with reading(self.path, self.sources):
                blocks = file.collect_batches(
                    chunk_size=self.rows_per_block, maintain_order=True, engine="streaming"
                )
                for block in blocks:
                    # Ray Data knows no string views.
                    yield block.to_arrow(compat_level=pl.CompatLevel.oldest())


@dataclass(frozen=True)
class Routing:
    """Deals the rows of a block to the partitions of their users."""

    scratch: Scratch

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The file that was written, `first_row` names it, or none where there are no rows."""
        if not batch.num_rows:
            return pa.table({"first_row": pa.array([], pa.int64())})
        block = pl.DataFrame(pl.from_arrow(batch))
        first_row = int(block["row"].min())  # type: ignore[arg-type]
        write_partitions(self.scratch.of("blocks", first_row), block, "user", self.scratch)
        return pa.table({"first_row": [first_row]})


def write_partitions(path: Path, rows: pl.DataFrame, user: str, scratch: Scratch) -> None:
    """Rows by the partition of the column `user`, one row group for each partition."""
    num = scratch.num_partitions
    rows = rows.with_columns((pl.col(user).hash() % num).alias("__partition__"))
    rows = rows.sort("__partition__", maintain_order=True)
    heights = np.bincount(rows["__partition__"].to_numpy(), minlength=num)
    with whole_file(path) as partial:
        write_row_groups(partial, cut(rows.drop("__partition__"), heights.tolist()))


# --- partitions ---------------------------------------------------------------------------------


def keep_rows(scratch: Scratch, partition: int, blocks: Sequence[int], filters: Filters) -> Heights:
    """The filters that look at one user at a time.

    Args:
        blocks: first rows.
    """
    files = [scratch.of("blocks", block) for block in sorted(blocks)]
    rows = pl.concat([read_row_groups(file, [partition]) for file in files]).sort("row")
    rows, heights = filter_rows(rows, filters)
    _write(scratch.of("kept", partition), rows)
    return heights


def count_items(scratch: Scratch, partition: int, filters: Filters) -> int:
    """How many rows are left, among the items that are alive; of each item in item_rows/."""
    rows = _core(scratch, partition, filters, ["user", "item"])
    _write(scratch.of("item_rows", partition), rows.group_by("item").len())
    return rows.height


def list_rows(scratch: Scratch, partition: int, filters: Filters) -> None:
    """The kept rows' places in the raw files, ascending, to rows/."""
    rows = _core(scratch, partition, filters, ["user", "item", "row"])
    _write(scratch.of("rows", partition), rows.select("row").sort("row"))


class Unknown(NamedTuple):
    """Of cells that are no split: whose row has the first one, that one, and how many."""

    user: Any
    cell: str
    num_rows: int


def assign(
    scratch: Scratch, partition: int, filters: Filters, split: Split, num_rows: int
) -> RowCounts | Unknown:
    """Set the splits; the rows go to split/, whom they are of to users/ and items/.

    Args:
        num_rows: of all partitions together.
    """
    rows = _core(scratch, partition, filters, None)
    draw = None
    if is_drawn(split):
        rows = rows.sort("row")
        draw = pl.read_parquet(scratch.of("draws", partition), glob=False)["draw"]
    else:
        rows = rows.sort("user", *time_order(rows))
    if unknown := unknown_splits(rows, split):
        cell, num = unknown
        return Unknown(_user_of_unknown(rows, cell), cell, num)
    rows = split_rows(rows, split, draw, num_rows)
    _write(scratch.of("split", partition), rows)
    for of in ("user", "item"):
        _write(scratch.of(f"{of}s", partition), entities(rows, of))
    return count_rows(rows)


def number_rows(
    scratch: Scratch, partition: int, parts: Sequence[Part], features: Sequence[Feature]
) -> None:
    """Dense ids, the final order, typed features; by part to numbered/."""
    dense = {
        "user": read_row_groups(scratch.dense("user"), [partition]),
        "item": pl.read_parquet(scratch.dense("item"), glob=False),
    }
    rows = renumber(pl.read_parquet(scratch.of("split", partition), glob=False), dense)
    for feature in features:
        rows = typed_feature(rows, feature)
    ends = np.array(list(accumulate(part.num_users for part in parts)))
    part_of = np.searchsorted(ends, rows["user"].to_numpy(), side="right")
    heights = np.bincount(part_of, minlength=len(parts))
    path = scratch.of("numbered", partition)
    with whole_file(path) as partial:
        write_row_groups(partial, cut(rows, heights.tolist()))


def read_part(scratch: Scratch, part: int) -> pl.DataFrame:
    """The final rows of a part of the dataset."""
    files = [scratch.of("numbered", partition) for partition in range(scratch.num_partitions)]
    # All rows of a user come from one partition, in order.
    rows = pl.concat([read_row_groups(file, [part]) for file in files])
    return rows.sort("user", maintain_order=True)


def _core(
    scratch: Scratch, partition: int, filters: Filters, columns: list[str] | None
) -> pl.DataFrame:
    """Kept rows of items that are alive, of users who have enough of them."""
    rows = pl.read_parquet(scratch.of("kept", partition), columns=columns, glob=False)
    if scratch.alive.exists():
        alive = pl.read_parquet(scratch.alive, glob=False)
        rows = rows.join(alive, on="item", how="semi", maintain_order="left")
    return rows.filter(pl.len().over("user") >= filters.user_core)


def _user_of_unknown(rows: pl.DataFrame, cell: str) -> Any:
    given = pl.col("split").cast(pl.String).fill_null("")
    return rows.filter(given == cell)["user"][0]


def _write(path: Path, rows: pl.DataFrame) -> None:
    with whole_file(path) as partial:
        write_row_groups(partial, [rows])
