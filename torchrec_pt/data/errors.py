"""The error that bad data raises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl


class DataError(ValueError):
    """Data the user can mend; the message is one line: where: rule, what was given; what to do."""


def shown(cell: object, longest: int = 60) -> str:
    """A cell inside a message: cut where it is long, its control characters escaped."""
    text = str(cell)
    text = text if len(text) <= longest else f"{text[:longest]}…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def reading(path: Path, files: Sequence[Path] = ()) -> Iterator[None]:
    """Turn what polars or the system says about a file into one line.

    Args:
        files: what `path` stands for where it is a folder or a glob; the broken one is named.
    Raises:
        DataError: instead of any PolarsError or OSError inside the block.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read, {reason}; check the path") from None
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        path = next(filter(_is_broken_parquet, files), path)
        if "utf" in reason.lower() and (line := _first_line_not_utf8(path)):
            raise DataError(f"{path}, line {line}: must be UTF-8; convert the file") from None
        raise DataError(
            f"{path}: cannot be read, {reason}; is the file whole, its quoting closed?"
        ) from None


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _is_broken_parquet(path: Path) -> bool:
    """What is found late is never in a text file: all its lines are looked at before."""
    if not _is_parquet(path):
        return False
    try:
        pl.read_parquet(path, glob=False)
    except pl.exceptions.PolarsError:
        return True
    return False


def _first_line_not_utf8(path: Path) -> int | None:
    """Of a text file; None where it is none, or the fault lies elsewhere."""
    if not path.is_file() or _is_parquet(path):
        return None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None
