"""Dense ids in place of external ones."""

from __future__ import annotations

import polars as pl

from torchrec_pt.data.splits import TRAIN, time_order


def renumber(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Interactions with dense ids, and the users and items that these stand for.

    Returns:
        The interactions, sorted by user, then time; then users in the order of their `row`, items
        by descending `count`, ties in the order of `row`, those that never train last. Both have
        `external_id`, `count` (of training rows) and `row`, the first training row (else the first
        row), by place in the raw files.
    """
    users = _entities(rows, "user").sort(pl.col("count") == 0, "row")
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


def _entities(rows: pl.DataFrame, of: str) -> pl.DataFrame:
    trains, row = pl.col("split") == TRAIN, pl.col("row")
    return rows.group_by(pl.col(of).alias("external_id")).agg(
        count=trains.sum().cast(pl.Int64),
        row=pl.coalesce(row.filter(trains).min(), row.min()),
    )
