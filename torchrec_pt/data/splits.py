"""Which interactions train, validate and test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from torchrec_pt.config import GivenSplit, LeaveOneOutSplit, RatioSplit, Split, TemporalSplit
from torchrec_pt.data.errors import DataError, shown

TRAIN, VALID, TEST = 0, 1, 2
SPLIT_CODES = {"train": TRAIN, "valid": VALID, "test": TEST}
_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996


class RowCounts(NamedTuple):
    """Of (training, validation, test).

    Attributes:
        num_taken: rows that are no mere impressions.
        num_repeats: of these, over all splits, those of an item that the user took before.
    """

    num_rows: tuple[int, ...]
    num_taken: tuple[int, ...]
    num_repeats: int


def time_order(interactions: pl.DataFrame) -> list[str]:
    """Sort keys of time; ties, and data without timestamps, keep the order of the files."""
    return ["timestamp", "row"] if "timestamp" in interactions.columns else ["row"]


def sort_by_user(rows: pl.DataFrame) -> pl.DataFrame:
    """By user, then time.

    Args:
        rows: those of each user in the order of the files or of time.
    """
    if "timestamp" in rows.columns:
        rows = rows.sort("timestamp", maintain_order=True)
    # A key at a time: polars takes twice as long to sort by several.
    return rows.sort("user", maintain_order=True)


def is_taken(rows: pl.DataFrame) -> pl.Expr:
    """Which rows are interactions; where there are labels, those above 0. Others are impressions:
    items that were shown and not taken."""
    return pl.col("label") > 0 if "label" in rows.columns else pl.lit(True)


def assign_splits(rows: pl.DataFrame, split: Split, seed: int) -> pl.DataFrame:
    """Set the column `split` (Int8), by rows in the order of the files or of time.

    Raises:
        DataError: a rule that the columns do not allow, or that leaves nothing to train on.
    """
    check_split(split, rows.columns)
    rows = sort_by_user(rows)
    if unknown := unknown_splits(rows, split):
        raise unknown_split(*unknown)
    draw = None
    if is_drawn(split):
        # Drawn in the order of the files, so that it does not depend on the sort above.
        rows = rows.sort("row")
        draw = draw_places(rows.height, seed)
    rows = split_rows(rows, split, draw, rows.height)
    check_training(split, int((rows["split"] == TRAIN).sum()), rows.height)
    return rows


def split_rows(
    rows: pl.DataFrame, split: Split, draw: pl.Series | None, num_rows: int
) -> pl.DataFrame:
    """`assign_splits` for all rows of some users, sorted by user, then time; nothing is checked.

    Args:
        draw: where `is_drawn`, the place of each row in a random order of all `num_rows`.
    """
    position, length = pl.int_range(pl.len()).over("user"), pl.len().over("user")
    match split:
        case LeaveOneOutSplit():
            from_end = length - 1 - position
            valid, test = from_end == 1, from_end == 0
            code = pl.when(length < 3).then(TRAIN).otherwise(_code(valid, test))
        case TemporalSplit():
            time = pl.col("timestamp")
            code = _code(time >= split.valid_from, time >= split.test_from)
        case RatioSplit(over="user"):
            code = _ratio_code(position, length, split)
        case RatioSplit():
            code = _ratio_code(pl.lit(draw), pl.lit(num_rows, pl.UInt32), split)
        case GivenSplit():
            code = pl.col("split").cast(pl.String).replace_strict(SPLIT_CODES)
    return rows.with_columns(code.cast(pl.Int8).alias("split"))


def is_drawn(split: Split) -> bool:
    """Whether a row's split depends on the number of all rows and a random order of them."""
    return isinstance(split, RatioSplit) and split.over == "all"


def draw_places(num_rows: int, seed: int) -> pl.Series:
    return pl.Series(np.random.default_rng(seed).permutation(num_rows))


def check_split(split: Split, columns: Sequence[str]) -> None:
    if isinstance(split, TemporalSplit) and "timestamp" not in columns:
        raise DataError(
            "data.split: temporal needs times, data.columns.timestamp is not set; set it"
        )
    if isinstance(split, GivenSplit) and "split" not in columns:
        raise DataError("data.split: given needs a column, data.columns.split is not set; set it")


def unknown_splits(rows: pl.DataFrame, split: Split) -> tuple[str, int] | None:
    """Where a column gives the splits: the first cell that is none, and how many are."""
    if not isinstance(split, GivenSplit):
        return None
    names = rows["split"].cast(pl.String)
    unknown = names.filter(~names.is_in(list(SPLIT_CODES)).fill_null(False))
    return (unknown[0] or "", len(unknown)) if len(unknown) else None


def unknown_split(cell: str, num_rows: int) -> DataError:
    return DataError(
        f'data.columns.split: cells must be "train", "valid" or "test", found "{shown(cell)}" in '
        f"{num_rows} rows; rename or drop them"
    )


def check_training(split: Split, num_train: int, num_rows: int) -> None:
    if not num_train:
        raise DataError(
            f"data.split: {split.rule} leaves no training row of {num_rows}; change the split"
        )


def count_rows(rows: pl.DataFrame) -> RowCounts:
    """Of rows with a `split`: all of each of their users."""
    taken = rows.filter(is_taken(rows))
    num_items = taken.group_by("user").agg(pl.col("item").n_unique())["item"]
    return RowCounts(
        tuple(int((rows["split"] == code).sum()) for code in (TRAIN, VALID, TEST)),
        tuple(int((taken["split"] == code).sum()) for code in (TRAIN, VALID, TEST)),
        taken.height - int(num_items.sum()),
    )


def fewest_to_evaluate(split: Split) -> int:
    """How many interactions a user needs to have a test row (or, with no test part, a valid one).

    1 where that is not a matter of the user's number.
    """
    match split:
        case LeaveOneOutSplit():
            return 3
        case RatioSplit(over="user"):
            part = split.test or split.valid
            return math.ceil((1 - _SLACK) / part) if part else 1
    return 1


def _code(valid: pl.Expr, test: pl.Expr) -> pl.Expr:
    return pl.when(test).then(TEST).when(valid).then(VALID).otherwise(TRAIN)


def _ratio_code(position: pl.Expr, length: pl.Expr, split: RatioSplit) -> pl.Expr:
    """Parts are rounded down, so that training never ends up empty."""
    num_test = (length * split.test + _SLACK).floor()
    num_valid = (length * split.valid + _SLACK).floor()
    return _code(position >= length - num_test - num_valid, position >= length - num_test)
