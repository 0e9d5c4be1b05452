"""Files of plain lines: cut at a separator, without quoting."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from torchrec_pt.data.errors import DataError, reading
from torchrec_pt.data.formats.part import RECORD, Part


def open_fields(
    path: Path, separator: str, names: list[str], lines: pl.LazyFrame | None = None
) -> Part:
    """A file without header: `names` are the fields of a line, `lines` its lines if known."""
    lines = scan_lines(path) if lines is None else lines
    check_field_counts(path, lines, separator, len(names))
    fields = pl.col("line").str.split_exact(separator, len(names) - 1)
    fields = fields.struct.rename_fields(names).alias("fields")
    frame = lines.filter(pl.col("line") != "").select(RECORD, fields).unnest("fields")
    return Part(path, frame, place_of_line)


def scan_lines(path: Path) -> pl.LazyFrame:
    """`line`, without its break and a byte order mark, and its number, from 0, in `RECORD`."""
    lines = pl.scan_lines(path, row_index_name=RECORD, glob=False)
    return lines.with_columns(pl.col("line").str.strip_prefix("\ufeff"))


def place_of_line(record: int) -> str:
    return f"line {record + 1}"


def check_field_counts(path: Path, lines: pl.LazyFrame, separator: str, num_fields: int) -> None:
    """Find a line that is neither empty nor of `num_fields` fields.

    Raises:
        DataError: there is one.
    """
    found = pl.col("line").str.count_matches(separator, literal=True) + 1
    ragged = lines.filter((pl.col("line") != "") & (found != num_fields)).head(1)
    with reading(path):
        rows = ragged.select(RECORD, found).collect(engine="streaming").rows()
    for record, count in rows:
        raise ragged_line(path, record + 1, num_fields, count)


def ragged_line(path: Path, line: int, expected: int, found: int) -> DataError:
    return DataError(
        f"{path}, line {line}: must have {expected} fields, has {found}; mend or remove the line"
    )
