"""Dense ids in place of external ones."""

from __future__ import annotations

import polars as pl

from torchrec_pt.data.errors import DataError
from torchrec_pt.data.splits import TRAIN, is_taken, time_order


def renumber(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Interactions with dense ids, and the users and items that these stand for.

    Returns:
        The interactions, sorted by user, then time; then users in the order of their `row`, items
        by descending `count`, ties in the order of `row`, those that never train last. Both have
        `external_id`, `count` (of training rows that are no mere impressions), `trains` (whether
        there is a training row at all) and `row`, the first training row (else the first row), by
        place in the raw files.
    """
    users = _entities(rows, "user").sort(~pl.col("trains"), "row")
    items = _entities(rows, "item").sort("count", "row", descending=[True, False])
    for name, table in (("user", users), ("item", items)):
        dense = table.select(
            pl.col("external_id").alias(name),
            pl.int_range(pl.len(), dtype=pl.Int32).alias("dense"),
        )
        rows = rows.join(dense, on=name).drop(name).rename({"dense": name})
    rows = rows.sort("user", *time_order(rows)).drop("row")
    order = ["user", "item", "timestamp", "rating", "label", "split"]
    known = [name for name in order if name in rows.columns]
    return rows.select(*known, pl.exclude(known)), users, items


def append_unseen(items: pl.DataFrame, features: pl.LazyFrame | None) -> pl.DataFrame:
    """After the items of `renumber`: those that `RawData.items` has beside them, in its order.

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


def _entities(rows: pl.DataFrame, of: str) -> pl.DataFrame:
    trains, row = pl.col("split") == TRAIN, pl.col("row")
    return rows.group_by(pl.col(of).alias("external_id")).agg(
        count=(trains & is_taken(rows)).sum().cast(pl.Int64),
        trains=trains.any(),
        row=pl.coalesce(row.filter(trains).min(), row.min()),
    )
