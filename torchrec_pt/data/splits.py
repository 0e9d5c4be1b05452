"""Which interactions train, validate and test."""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from torchrec_pt.config import GivenSplit, LeaveOneOutSplit, RatioSplit, Split, TemporalSplit
from torchrec_pt.data.errors import DataError, shown

TRAIN, VALID, TEST = 0, 1, 2
SPLIT_CODES = {"train": TRAIN, "valid": VALID, "test": TEST}
_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996


def time_order(interactions: pl.DataFrame) -> list[str]:
    """Sort keys of time; ties, and data without timestamps, keep the order of the files."""
    return ["timestamp", "row"] if "timestamp" in interactions.columns else ["row"]


def is_taken(rows: pl.DataFrame) -> pl.Expr:
    """Which rows are interactions; where there are labels, those above 0. Others are impressions:
    items that were shown and not taken."""
    return pl.col("label") > 0 if "label" in rows.columns else pl.lit(True)


def assign_splits(rows: pl.DataFrame, split: Split, seed: int) -> pl.DataFrame:
    """Set the column `split` (Int8), by rows in the order of the files or of time."""
    rows = rows.sort("user", *time_order(rows))
    position, length = pl.int_range(pl.len()).over("user"), pl.len().over("user")
    match split:
        case LeaveOneOutSplit():
            from_end = length - 1 - position
            valid, test = from_end == 1, from_end == 0
            code = pl.when(length < 3).then(TRAIN).otherwise(_code(valid, test))
        case TemporalSplit():
            if "timestamp" not in rows.columns:
                raise DataError(
                    "data.split: temporal needs times, data.columns.timestamp is not set; set it"
                )
            time = pl.col("timestamp")
            code = _code(time >= split.valid_from, time >= split.test_from)
        case RatioSplit(over="user"):
            code = _ratio_code(position, length, split)
        case RatioSplit():
            # Drawn in the order of the files, so that it does not depend on the sort above.
            rows = rows.sort("row")
            draw = np.random.default_rng(seed).permutation(rows.height)
            code = _ratio_code(pl.lit(pl.Series(draw)), pl.len(), split)
        case GivenSplit():
            code = _given_code(rows)
    rows = rows.with_columns(code.cast(pl.Int8).alias("split"))
    if not (rows["split"] == TRAIN).any():
        raise DataError(
            f"data.split: {split.rule} leaves no training row of {rows.height}; change the split"
        )
    return rows


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


def _given_code(rows: pl.DataFrame) -> pl.Expr:
    if "split" not in rows.columns:
        raise DataError("data.split: given needs a column, data.columns.split is not set; set it")
    name = pl.col("split").cast(pl.String)
    unknown = rows.filter(~name.is_in(list(SPLIT_CODES)).fill_null(False))
    if unknown.height:
        raise DataError(
            f'data.columns.split: cells must be "train", "valid" or "test", found '
            f'"{shown(unknown["split"][0] or "")}" in {unknown.height} rows; rename or drop them'
        )
    return name.replace_strict(SPLIT_CODES)
