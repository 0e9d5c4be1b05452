"""CSV and TSV: a header, a separator, cells that may be quoted."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl

from torchrec_pt.data.errors import DataError, reading
from torchrec_pt.data.formats.lines import check_field_counts, ragged_line, scan_lines
from torchrec_pt.data.formats.part import RECORD, Part


def open_delimited(path: Path, separator: str, quote: str | None) -> Part:
    with reading(path):
        frame = pl.scan_csv(
            path,
            separator=separator,
            quote_char=quote,
            infer_schema=False,  # strings: an id must not pass through a float
            glob=False,
            row_index_name=RECORD,
        )
        names = [name for name in frame.collect_schema() if name != RECORD]
    for name in names:
        if f"{name}_duplicated_0" in names:
            raise DataError(f'{path}: column "{name}" appears twice in the header; rename one')
    _check_records(path, separator, quote, len(names))
    # A blank line is a record of nulls to polars.
    frame = frame.filter(pl.any_horizontal(pl.col(names).is_not_null()))
    return Part(path, frame, lambda record: f"line {_line_of(path, separator, quote, record)}")


def _check_records(path: Path, separator: str, quote: str | None, num_fields: int) -> None:
    """Find a ragged line: polars pads a short one with nulls without a word."""
    lines = scan_lines(path)
    has_quotes = False
    if quote:
        with reading(path):
            quoted = lines.select(pl.col("line").str.contains(quote, literal=True).any())
            has_quotes = quoted.collect(engine="streaming").item()
    if quote and has_quotes:
        _check_quoted_records(path, separator, quote, num_fields)
    else:
        check_field_counts(path, lines, separator, num_fields)


def _check_quoted_records(path: Path, separator: str, quote: str, num_fields: int) -> None:
    line_number = 1
    try:
        for line_number, fields, num_quotes in _csv_records(path, separator, quote):
            if fields and len(fields) != num_fields:
                raise ragged_line(path, line_number, num_fields, len(fields))
            if num_quotes % 2:  # polars would read on to the next one
                raise DataError(
                    f"{path}, line {line_number}: quotes must come in pairs, found {num_quotes}; "
                    'write a cell like 12" tape as "12"" tape"'
                )
    except csv.Error as error:
        raise DataError(
            f"{path}, after line {line_number}: not valid CSV, {error}; check the quotes"
        ) from None


def _csv_records(
    path: Path, separator: str, quote: str | None
) -> Iterator[tuple[int, list[str], int]]:
    """Each record, header included: the line it starts on, its cells, its number of quotes."""
    csv.field_size_limit(2**31 - 1)  # the default refuses long texts
    num_quotes = 0

    def counted(lines: Iterable[str]) -> Iterator[str]:
        nonlocal num_quotes
        for line in lines:
            num_quotes += line.count(quote) if quote else 0
            yield line

    with path.open(encoding="utf-8-sig", newline="") as file:
        records = csv.reader(
            counted(file),
            delimiter=separator,
            quotechar=quote,
            quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
            strict=True,
        )
        start = 1
        for fields in records:
            yield start, fields, num_quotes
            start, num_quotes = records.line_num + 1, 0


def _line_of(path: Path, separator: str, quote: str | None, record: int) -> int:
    """The line that a record (0 = the first after the header) starts on; cells may hold breaks."""
    return next(itertools.islice(_csv_records(path, separator, quote), record + 1, None))[0]
