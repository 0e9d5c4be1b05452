"""Which interactions are kept."""

from __future__ import annotations

from itertools import pairwise

import polars as pl

from torchrec_pt.config import Filters
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import Dropped
from torchrec_pt.data.splits import time_order


def apply_filters(rows: pl.DataFrame, filters: Filters) -> tuple[pl.DataFrame, Dropped]:
    """Rating, duplicates ("first" and "last" in time), then the k-core."""
    heights = [rows.height]
    if filters.min_rating is not None:
        if "rating" not in rows.columns:
            raise DataError(
                "data.filters.min_rating: needs ratings, data.columns.rating is not set; set it"
            )
        rows = rows.filter(pl.col("rating") >= filters.min_rating)
    heights.append(rows.height)
    if filters.duplicates != "keep":
        rows = rows.sort(time_order(rows)).unique(
            ["user", "item"], keep=filters.duplicates, maintain_order=True
        )
    heights.append(rows.height)
    in_core = (pl.len().over("user") >= filters.user_core) & (
        pl.len().over("item") >= filters.item_core
    )
    # Dropping an item can push a user below its limit, and the other way round.
    before = -1
    while rows.height != before:
        before = rows.height
        rows = rows.filter(in_core)
    heights.append(rows.height)
    taken = [before - after for before, after in pairwise(heights)]
    dropped = Dropped(rating=taken[0], duplicates=taken[1], core=taken[2])
    if not rows.height:
        raise DataError(
            f"data.filters: nothing is left of {heights[0]} rows; min_rating took {taken[0]}, "
            f"duplicates {taken[1]}, user_core and item_core {taken[2]}; loosen them"
        )
    return rows, dropped
