"""Interactions that outgrow memory: partitions of them wait on the disk, a few are worked on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import pyarrow.parquet as pq

from torchrec_pt.config import DataConfig, Feature, Filters, Split
from torchrec_pt.data.engine import Interactions
from torchrec_pt.data.filters import Heights, count_dropped
from torchrec_pt.data.manifest import Dropped, Part
from torchrec_pt.data.numbering import dense_ids, merge_entities
from torchrec_pt.data.partition_files import (
    Scratch,
    read_batches,
    read_blocks,
    write_batches,
    write_block,
    write_partitions,
)
from torchrec_pt.data.partition_passes import (
    Unknown,
    assign,
    count_items,
    keep_rows,
    list_rows,
    number_rows,
    read_part,
)
from torchrec_pt.data.parts import write_row_groups
from torchrec_pt.data.polars_engine import PolarsInteractions
from torchrec_pt.data.readers import RawData
from torchrec_pt.data.splits import (
    RowCounts,
    check_split,
    check_training,
    draw_places,
    is_drawn,
    unknown_split,
)

ROWS_IN_MEMORY = 1 << 21

_T = TypeVar("_T")


@dataclass(frozen=True)
class Sizes:
    """What is held at a time, in rows."""

    block: int = 1 << 20
    partition: int = 1 << 20


def open_locally(config: DataConfig, raw: RawData, scratch: Path) -> Interactions:
    """In memory, or, of a long log, by partitions: whichever it is, the dataset is the same."""
    if raw.num_rows <= ROWS_IN_MEMORY:
        return PolarsInteractions(config, raw, scratch)
    return PartitionedInteractions(config, raw, scratch, Sizes())


class PartitionedInteractions:
    """See `engine.Interactions`; the passes are those of `partition_passes`.

    A subclass may have `_deal` and `_each` done by others.
    """

    def __init__(self, config: DataConfig, raw: RawData, scratch: Path, sizes: Sizes) -> None:
        self._config = config
        self._columns = raw.files[0].collect_schema().names()
        num_partitions = -(-raw.num_rows // sizes.partition)
        self._scratch = Scratch(scratch.absolute(), num_partitions)
        self._num_rows = 0
        self._written: Path | None = None
        self._blocks = self._deal(raw, sizes)

    def _deal(self, raw: RawData, sizes: Sizes) -> list[int]:
        """Deal the rows of the log to the partitions, a block at a time; the blocks' first rows."""
        blocks = read_blocks(raw.files, self._config.path, raw.sources, sizes.block)
        return [write_block(self._scratch, block) for block in blocks]

    def _each(self, task: Callable[..., _T], *arguments: Any) -> list[_T]:
        """task(scratch, partition, *arguments) for every partition, in their order."""
        partitions = range(self._scratch.num_partitions)
        return [task(self._scratch, partition, *arguments) for partition in partitions]

    def filter(self, filters: Filters) -> Dropped:
        heights = self._each(keep_rows, self._blocks, filters)
        shutil.rmtree(self._scratch.folder / "blocks")
        sums = Heights(*map(sum, zip(*heights, strict=True)))
        self._num_rows = sums.distinct
        if filters.user_core > 1 or filters.item_core > 1:
            self._num_rows = self._find_core(filters)
        return count_dropped(sums, self._num_rows)

    def _find_core(self, filters: Filters) -> int:
        """Drop items until all that are left have enough rows, and the users, too."""
        while True:
            num_rows = sum(self._each(count_items, filters))
            counts = _merge(self._tables("item_rows"), _add_counts)
            alive = counts.filter(pl.col("len") >= filters.item_core)
            if alive.height == counts.height:
                return num_rows
            write_batches(self._scratch.alive, [alive.select("item")])

    def split(self, split: Split, seed: int) -> RowCounts:
        check_split(split, self._columns)
        filters = self._config.filters
        if is_drawn(split):
            self._draw(filters, seed)
        found = self._each(assign, filters, split, self._num_rows)
        unknown = [one for one in found if isinstance(one, Unknown)]
        if unknown:
            raise unknown_split(min(unknown).cell, sum(one.num_rows for one in unknown))
        shutil.rmtree(self._scratch.folder / "kept")
        counts = [one for one in found if isinstance(one, RowCounts)]
        sums = RowCounts(
            tuple(map(sum, zip(*(one.num_rows for one in counts), strict=True))),
            tuple(map(sum, zip(*(one.num_taken for one in counts), strict=True))),
            sum(one.num_repeats for one in counts),
        )
        check_training(split, sums.num_rows[0], self._num_rows)
        return sums

    def _draw(self, filters: Filters, seed: int) -> None:
        """Every partition its rows' places in a random order of all rows."""
        self._each(list_rows, filters)
        rows = pl.concat(
            table.select("row", partition=pl.lit(partition, pl.Int32))
            for partition, table in enumerate(self._tables("rows"))
        ).sort("row")
        rows = rows.with_columns(draw_places(rows.height, seed).alias("draw"))
        by_partition = rows.partition_by("partition", maintain_order=True, as_dict=True)
        for partition in range(self._scratch.num_partitions):
            draws = by_partition.get((partition,), rows.clear()).select("draw")
            write_batches(self._scratch.of("draws", partition), [draws])

    def entities(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        users = pl.concat(self._tables("users"))
        assert users["external_id"].is_unique().all()  # or who dealt them disagree
        return users, _merge(self._tables("items"), merge_entities)

    def number(
        self,
        users: pl.DataFrame,
        items: pl.DataFrame,
        parts: Sequence[Part],
        features: Sequence[Feature],
    ) -> None:
        dense = dense_ids(users["external_id"], "user")
        write_partitions(self._scratch.dense("user"), dense, "user", self._scratch)
        write_batches(self._scratch.dense("item"), [dense_ids(items["external_id"], "item")])
        self._each(number_rows, parts, features)
        shutil.rmtree(self._scratch.folder / "split")

    def write(self, path: Path, parts: Sequence[Part]) -> None:
        write_row_groups(path, (read_part(self._scratch, part) for part in range(len(parts))))
        self._written = path

    def column(self, name: str) -> pl.Series:
        assert self._written is not None
        table = pq.read_table(self._written, columns=[name])
        return pl.DataFrame(pl.from_arrow(table))[name].rechunk()

    def _tables(self, pass_name: str) -> Iterator[pl.DataFrame]:
        for partition in range(self._scratch.num_partitions):
            yield read_batches(self._scratch.of(pass_name, partition))


def _merge(
    tables: Iterable[pl.DataFrame], merge: Callable[[Sequence[pl.DataFrame]], pl.DataFrame]
) -> pl.DataFrame:
    """merge(all tables) while they come, so that no more than twice its rows wait in memory."""
    waiting: list[pl.DataFrame] = []
    for table in tables:
        waiting.append(table)
        if sum(one.height for one in waiting[1:]) >= waiting[0].height:
            waiting = [merge(waiting)]
    return merge(waiting)


def _add_counts(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(tables).group_by("item").agg(pl.col("len").sum())
