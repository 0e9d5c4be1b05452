"""The passes of a preparation that goes partition by partition.

A partition holds all rows of some users, so whatever a rule says of a user is decided inside it.
What goes from one pass to the next lies in `Scratch.folder`, which whoever works on it sees:

    blocks/<first row>.arrow     rows of the log, one batch for each partition
    kept/<p>.arrow               a partition, filtered but for the k-core
    item_rows/, rows/, draws/    of a partition: rows of each item; place in the raw files of
                                 each row; their places in a random order
    alive.arrow                  items with enough rows, as far as is known
    split/, users/, items/       a partition with its splits, and whom it is of
    dense_users.arrow, dense_items.arrow
    numbered/<p>.arrow           the final rows, one batch for each part of the dataset
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from torchrec_pt.config import Feature, Filters, Split
from torchrec_pt.data.features import typed_feature
from torchrec_pt.data.filters import Heights, filter_rows
from torchrec_pt.data.manifest import Part
from torchrec_pt.data.numbering import entities, renumber
from torchrec_pt.data.partition_files import Scratch, read_batches, write_batches
from torchrec_pt.data.parts import cut
from torchrec_pt.data.splits import (
    RowCounts,
    count_rows,
    is_drawn,
    sort_by_user,
    split_rows,
    unknown_splits,
)


def keep_rows(scratch: Scratch, partition: int, blocks: Sequence[int], filters: Filters) -> Heights:
    """The filters that look at one user at a time.

    Args:
        blocks: first rows.
    """
    files = [scratch.of("blocks", block) for block in sorted(blocks)]
    rows = pl.concat([read_batches(file, [partition]) for file in files]).sort("row")
    rows, heights = filter_rows(rows, filters)
    write_batches(scratch.of("kept", partition), [rows])
    return heights


def count_items(scratch: Scratch, partition: int, filters: Filters) -> int:
    """How many rows are left, among the items that are alive; of each item in item_rows/."""
    rows = _core(scratch, partition, filters, ["user", "item"])
    write_batches(scratch.of("item_rows", partition), [rows.group_by("item").len()])
    return rows.height


def list_rows(scratch: Scratch, partition: int, filters: Filters) -> None:
    """The kept rows' places in the raw files, ascending, to rows/."""
    rows = _core(scratch, partition, filters, ["user", "item", "row"])
    write_batches(scratch.of("rows", partition), [rows.select("row").sort("row")])


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
        draw = read_batches(scratch.of("draws", partition))["draw"]
    else:
        rows = sort_by_user(rows)
    if unknown := unknown_splits(rows, split):
        cell, num = unknown
        return Unknown(_user_of_unknown(rows, cell), cell, num)
    rows = split_rows(rows, split, draw, num_rows)
    write_batches(scratch.of("split", partition), [rows])
    for of in ("user", "item"):
        write_batches(scratch.of(f"{of}s", partition), [entities(rows, of)])
    return count_rows(rows)


def number_rows(
    scratch: Scratch, partition: int, parts: Sequence[Part], features: Sequence[Feature]
) -> None:
    """Dense ids, the final order, typed features; by part to numbered/."""
    dense = {
        "user": read_batches(scratch.dense("user"), [partition]),
        "item": read_batches(scratch.dense("item")),
    }
    rows = renumber(read_batches(scratch.of("split", partition)), dense)
    for feature in features:
        rows = typed_feature(rows, feature)
    ends = np.array(list(accumulate(part.num_users for part in parts)))
    part_of = np.searchsorted(ends, rows["user"].to_numpy(), side="right")
    heights = np.bincount(part_of, minlength=len(parts))
    write_batches(scratch.of("numbered", partition), cut(rows, heights.tolist()))


def read_part(scratch: Scratch, part: int) -> pl.DataFrame:
    """The final rows of a part of the dataset."""
    files = [scratch.of("numbered", partition) for partition in range(scratch.num_partitions)]
    # All rows of a user come from one partition, in order.
    rows = pl.concat([read_batches(file, [part]) for file in files])
    return rows.sort("user", maintain_order=True)


def _core(
    scratch: Scratch, partition: int, filters: Filters, columns: list[str] | None
) -> pl.DataFrame:
    """Kept rows of items that are alive, of users who have enough of them."""
    rows = read_batches(scratch.of("kept", partition), columns=columns)
    if scratch.alive.exists():
        alive = read_batches(scratch.alive)
        rows = rows.join(alive, on="item", how="semi", maintain_order="left")
    if filters.user_core > 1:
        rows = rows.filter(pl.len().over("user") >= filters.user_core)
    return rows


def _user_of_unknown(rows: pl.DataFrame, cell: str) -> Any:
    given = pl.col("split").cast(pl.String).fill_null("")
    return rows.filter(given == cell)["user"][0]
