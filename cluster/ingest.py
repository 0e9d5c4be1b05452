"""Preparation over a Ray cluster: Ray Data reads and works on the interactions.

    python -m cluster.ingest CONFIG.toml     prepares alone, on the Ray of RAY_ADDRESS or one here

The dataset is the one that `torchrec-pt prepare` writes, to the byte. Blocks of the log stream
into partitions by user, in files beside the dataset, and every later pass takes a partition at a
time. So neither the object store nor the memory of a node need hold the log; a task holds a block
or a partition, the driver the users, the items, and of the rows a column at a time. A file of the
log is read by one task: a log of many files is read by many.

The log and the folder of the dataset must be where every node sees them.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import polars as pl
import pyarrow.parquet as pq
import ray
import ray.data
import typer
from ray.exceptions import RayError
from rich.console import Console

from cluster.client import mistakes_of
from cluster.ingest_tasks import (
    Reading,
    Routing,
    Scratch,
    Unknown,
    assign,
    count_items,
    keep_rows,
    list_rows,
    number_rows,
    read_part,
    write_partitions,
)
from torchrec_pt.config import DataConfig, Feature, Filters, RunConfig, Split
from torchrec_pt.config_file import load_config
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.filters import Heights, count_dropped
from torchrec_pt.data.manifest import Dropped, Manifest, Part
from torchrec_pt.data.numbering import dense_ids, merge_entities
from torchrec_pt.data.parts import write_row_groups
from torchrec_pt.data.prepare import prepare
from torchrec_pt.data.readers import RawData
from torchrec_pt.data.splits import (
    RowCounts,
    check_split,
    check_training,
    draw_places,
    is_drawn,
    unknown_split,
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Sizes:
    """What a task holds at a time, in rows."""

    block: int = 1 << 18
    partition: int = 1 << 20


def prepare_on_ray(
    config: RunConfig, console: Console | None = None, sizes: Sizes | None = None
) -> Manifest:
    """`torchrec_pt.data.prepare.prepare` over the Ray that this process is connected to.

    Raises:
        DataError: as `prepare`, or a folder that not every node sees.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    started_at = time.monotonic()
    opened = partial(RayInteractions, sizes=sizes or Sizes())
    manifest = prepare(config.data, config.prepared_dir, config.seed, opened)
    if console is not None:
        console.print(
            f"prepare: {manifest.num_interactions:,} interactions by Ray Data in "
            f"{time.monotonic() - started_at:.1f} s",
            highlight=False,
        )
    return manifest


class RayInteractions:
    """See `torchrec_pt.data.engine.Interactions`; the passes are those of `ingest_tasks`."""

    def __init__(self, config: DataConfig, raw: RawData, scratch: Path, sizes: Sizes) -> None:
        self._config = config
        self._columns = raw.files[0].collect_schema().names()
        num_partitions = -(-raw.num_rows // sizes.partition)
        self._scratch = Scratch(scratch.absolute(), num_partitions)
        self._num_rows = 0
        self._written: Path | None = None
        self._blocks = self._read(raw, sizes)

    def _read(self, raw: RawData, sizes: Sizes) -> list[int]:
        """The blocks of the log, dealt to the partitions; their first rows."""
        path = self._config.path
        working_dir = None if path.is_absolute() else Path.cwd()
        files = [{"file": pickle.dumps(file)} for file in raw.files]
        blocks = (
            ray.data.from_items(files, override_num_blocks=len(files))
            .map_batches(
                Reading(path, raw.sources, working_dir, sizes.block),
                batch_size=1,
                batch_format="pyarrow",
            )
            .map_batches(
                Routing(self._scratch),
                batch_size=None,
                batch_format="pyarrow",
            )
        )
        first_rows = [row["first_row"] for row in _taken(blocks)]
        if not all(self._scratch.of("blocks", row).is_file() for row in first_rows):
            raise DataError(
                f"data.prepared: {self._scratch.folder.parent} must be a folder that every node "
                "sees, a node wrote into one of its own; choose another, or ingest locally"
            )
        return first_rows

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
            counts = pl.concat(self._tables("item_rows")).group_by("item").agg(pl.col("len").sum())
            alive = counts.filter(pl.col("len") >= filters.item_core)
            if alive.height == counts.height:
                return num_rows
            write_row_groups(self._scratch.alive, [alive.select("item")])

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
        (self._scratch.folder / "draws").mkdir()
        by_partition = rows.partition_by("partition", maintain_order=True, as_dict=True)
        for partition in range(self._scratch.num_partitions):
            draws = by_partition.get((partition,), rows.clear()).select("draw")
            write_row_groups(self._scratch.of("draws", partition), [draws])

    def entities(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        users = pl.concat(self._tables("users"))
        assert users["external_id"].is_unique().all()  # or nodes disagree about the partitions
        return users, merge_entities(self._tables("items"))

    def number(
        self,
        users: pl.DataFrame,
        items: pl.DataFrame,
        parts: Sequence[Part],
        features: Sequence[Feature],
    ) -> None:
        dense = dense_ids(users["external_id"], "user")
        write_partitions(self._scratch.dense("user"), dense, "user", self._scratch)
        write_row_groups(self._scratch.dense("item"), [dense_ids(items["external_id"], "item")])
        self._each(number_rows, parts, features)
        shutil.rmtree(self._scratch.folder / "split")

    def write(self, path: Path, parts: Sequence[Part]) -> None:
        write_row_groups(path, (read_part(self._scratch, part) for part in range(len(parts))))
        self._written = path

    def column(self, name: str) -> pl.Series:
        assert self._written is not None
        table = pq.read_table(self._written, columns=[name])
        return pl.DataFrame(pl.from_arrow(table))[name].rechunk()

    def _tables(self, pass_name: str) -> list[pl.DataFrame]:
        paths = [self._scratch.of(pass_name, p) for p in range(self._scratch.num_partitions)]
        return [pl.read_parquet(path, glob=False) for path in paths]

    def _each(self, task: Callable[..., _T], *arguments: Any) -> list[_T]:
        """task(scratch, partition, *arguments) for every partition, in their order."""
        scratch = self._scratch
        num_partitions = scratch.num_partitions

        def call(row: dict[str, Any]) -> dict[str, Any]:
            partition = int(row["id"])
            result: _T | DataError
            try:
                result = task(scratch, partition, *arguments)
            except DataError as error:  # raised, Ray Data would log its traceback
                result = error
            return {"partition": partition, "result": pickle.dumps(result)}

        rows = _taken(ray.data.range(num_partitions, override_num_blocks=num_partitions).map(call))
        rows.sort(key=lambda row: row["partition"])
        results = [pickle.loads(row["result"]) for row in rows]
        for result in results:
            if isinstance(result, DataError):
                raise result
        return results


def _taken(dataset: ray.data.Dataset) -> list[dict[str, Any]]:
    """All rows.

    Raises:
        DataError: what a task raised for the user.
    """
    try:
        return dataset.take_all()
    except RayError as error:
        # Ray's own error is an instance of its cause's class, too, but says more than a line.
        found: BaseException | None = error
        while isinstance(found, RayError):
            found = getattr(found, "cause", None) or found.__cause__
        if isinstance(found, DataError):
            raise DataError(str(found).splitlines()[0]) from None  # Ray Data adds lines to it
        raise


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ingest(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE")] = None,
) -> None:
    """Prepare the dataset of a run over a Ray cluster."""
    settings = load_config(config, set_ or ())
    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    prepare_on_ray(settings, Console(soft_wrap=True, markup=False, emoji=False))


def main() -> None:
    with mistakes_of("cluster.ingest"):
        app()


if __name__ == "__main__":
    main()
