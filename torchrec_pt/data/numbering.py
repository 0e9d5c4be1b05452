"""Dense ids in place of external ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from torchrec_pt.data.errors import DataError
from torchrec_pt.data.splits import TRAIN, is_taken, sort_by_user


def entities(rows: pl.DataFrame, of: str) -> pl.DataFrame:
    """The users or items of some rows, in any order.

    Returns:
        `external_id`; `count`, of training rows that are no mere impressions; `trains`, whether
        there is a training row at all; `num_rows`; `train_row` and `first_row`, the first training
        row, or null, and the first row, by place in the raw files.
    """
    trains, row = pl.col("split") == TRAIN, pl.col("row")
    return rows.group_by(pl.col(of).alias("external_id")).agg(
        count=(trains & is_taken(rows)).sum().cast(pl.Int64),
        trains=trains.any(),
        num_rows=pl.len().cast(pl.Int64),
        train_row=row.filter(trains).min(),
        first_row=row.min(),
    )


def merge_entities(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """`entities` of all rows, from those of some each."""
    return (
        pl.concat(tables)
        .group_by("external_id")
        .agg(
            pl.col("count").sum(),
            pl.col("trains").any(),
            pl.col("num_rows").sum(),
            pl.col("train_row", "first_row").min(),
        )
    )


def order_users(users: pl.DataFrame) -> pl.DataFrame:
    """By dense id: in the order of their `row` (the first training row, else the first row), those
    that never train last."""
    return _with_row(users).sort(~pl.col("trains"), "row")


def order_items(items: pl.DataFrame) -> pl.DataFrame:
    """By dense id: by descending `count`, ties in the order of `row`."""
    return _with_row(items).sort("count", "row", descending=[True, False])


def _with_row(table: pl.DataFrame) -> pl.DataFrame:
    row = pl.coalesce("train_row", "first_row").alias("row")
    return table.with_columns(row).drop("train_row", "first_row")


def dense_ids(external: pl.Series, name: str) -> pl.DataFrame:
    """`name`: the external ids; `dense`: their rows."""
    return pl.DataFrame({name: external}).with_columns(
        pl.int_range(pl.len(), dtype=pl.Int32).alias("dense")
    )


def renumber(rows: pl.DataFrame, dense: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Rows with dense ids in place of external ones, sorted by user, then time.

    Args:
        rows: those of each user in the order of the files or of time.
        dense: of "user" and "item" what `dense_ids` gives; those of other rows may be there, too.
    """
    for name in ("user", "item"):
        rows = rows.join(dense[name], on=name, maintain_order="left")
        rows = rows.drop(name).rename({"dense": name})
    rows = sort_by_user(rows).drop("row")
    order = ["user", "item", "timestamp", "rating", "label", "split"]
    known = [name for name in order if name in rows.columns]
    return rows.select(*known, pl.exclude(known))


def append_unseen(items: pl.DataFrame, features: pl.LazyFrame | None) -> pl.DataFrame:
    """After the items of `order_items`: those that `RawData.items` has beside them, in its order.

    Raises:
        DataError: no file of items was read.
    """
    if features is None or "external_id" not in features.collect_schema():
        raise DataError(
            "data.keep_unseen_items: needs a file of items beside the interactions and a feature "
            "of item from it, has none; use the movielens or recbole format and declare one in "
            "data.features"
        )
    unseen = features.select("external_id").join(
        items.lazy(), on="external_id", how="anti", maintain_order="left"
    )
    counted = unseen.with_columns(count=pl.lit(0, pl.Int64), trains=False)
    return pl.concat([items, counted.collect(engine="streaming")], how="diagonal")
