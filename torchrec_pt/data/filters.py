"""Which interactions are kept."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import polars as pl

from torchrec_pt.config import Filters
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import Dropped
from torchrec_pt.data.splits import time_order


class Heights(NamedTuple):
    """Rows that were there, and after each filter."""

    raw: int
    rated: int
    distinct: int


def filter_rows(rows: pl.DataFrame, filters: Filters) -> tuple[pl.DataFrame, Heights]:
    """The filters that look at one user at a time: rating, then duplicates.

    Args:
        rows: all of each of their users.
    Raises:
        DataError: no ratings to filter by.
    """
    raw = rows.height
    if filters.min_rating is not None:
        if "rating" not in rows.columns:
            raise DataError(
                "data.filters.min_rating: needs ratings, data.columns.rating is not set; set it"
            )
        rows = rows.filter(pl.col("rating") >= filters.min_rating)
    rated = rows.height
    if filters.duplicates != "keep":
        rows = rows.sort(time_order(rows)).unique(
            ["user", "item"], keep=filters.duplicates, maintain_order=True
        )
    return rows, Heights(raw, rated, rows.height)


def k_core(rows: pl.DataFrame, filters: Filters) -> pl.DataFrame:
    """The rows whose users and items have enough of them, which are the same in any order."""
    in_core = (pl.len().over("user") >= filters.user_core) & (
        pl.len().over("item") >= filters.item_core
    )
    # Dropping an item can push a user below its limit, and the other way round.
    before = -1
    while rows.height != before:
        before = rows.height
        rows = rows.filter(in_core)
    return rows


def count_dropped(heights: Heights, num_left: int) -> Dropped:
    """What each filter took.

    Raises:
        DataError: all rows.
    """
    taken = [before - after for before, after in pairwise([*heights, num_left])]
    if not num_left:
        raise DataError(
            f"data.filters: nothing is left of {heights.raw} rows; min_rating took {taken[0]}, "
            f"duplicates {taken[1]}, user_core and item_core {taken[2]}; loosen them"
        )
    return Dropped(rating=taken[0], duplicates=taken[1], core=taken[2])
