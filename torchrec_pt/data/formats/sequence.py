"""Sequence text: one line a user."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from torchrec_pt.data.errors import DataError, reading, shown
from torchrec_pt.data.formats.lines import place_of_line, scan_lines
from torchrec_pt.data.formats.part import RECORD, Part


def open_sequence(path: Path) -> Part:
    """`user item item …`: the timestamp of an item is its position in the line."""
    lines = scan_lines(path).with_columns(
        pl.col("line").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
    )
    words = pl.col("line")
    lines = lines.filter(words.list.first() != "")
    users = lines.select(RECORD, user_id=words.list.first(), length=words.list.len())
    with reading(path):
        bad = users.filter((pl.col("length") < 2) | ~pl.col("user_id").is_first_distinct()).collect(
            engine="streaming"
        )
    if bad.height:
        record, user, length = bad.row(0)
        rule = "must name an item after the user" if length < 2 else "must be its user's only line"
        raise DataError(f'{path}, line {record + 1}: {rule}, user "{shown(user)}"; mend the line')
    frame = (
        lines.select(RECORD, user_id=words.list.first(), item_id=words.list.slice(1))
        .with_columns(timestamp=pl.int_ranges(0, pl.col("item_id").list.len()))
        .explode("item_id", "timestamp")
    )
    return Part(path, frame, place_of_line)
