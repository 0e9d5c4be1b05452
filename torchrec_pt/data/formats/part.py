"""One raw file, opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

# Record number inside one file; a name that no raw file is likely to use.
RECORD = "__record__"


@dataclass(frozen=True)
class Part:
    """A file's own columns, cells still as the file has them, and `RECORD`.

    `place` says where a record is ("line 7").
    """

    path: Path
    frame: pl.LazyFrame
    place: Callable[[int], str]
