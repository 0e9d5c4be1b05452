"""The error that bad data raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl


class DataError(ValueError):
    """Data the user can mend; the message is one line: where: rule, what was given; what to do."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what polars or the system says about a file into one line.

    Raises:
        DataError: instead of any PolarsError or OSError inside the block.
    """
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        if "utf" in reason.lower():
            line = _first_line_not_utf8(path)
            raise DataError(f"{path}, line {line}: must be UTF-8; convert the file") from None
        raise DataError(
            f"{path}: cannot be read, {reason}; is the file whole, its quoting closed?"
        ) from None


def _first_line_not_utf8(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError("every line is UTF-8")
