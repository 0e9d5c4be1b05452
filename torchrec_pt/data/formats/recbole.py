"""RecBole atomic files: `.inter`, and `.user` and `.item` beside it."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from torchrec_pt.data.errors import DataError, shown
from torchrec_pt.data.formats.delimited import open_delimited
from torchrec_pt.data.formats.part import RECORD, Part


def side_files(path: Path) -> tuple[Path, Path]:
    """Where the features of users and of items would stand."""
    return path.with_suffix(".user"), path.with_suffix(".item")


def open_recbole(path: Path) -> Part:
    """Atomic file: a header of `name:type`, tabs, no quoting; `*_seq` cells hold several values."""
    part = open_delimited(path, "\t", quote=None)
    columns = [pl.col(RECORD)]
    for header in part.frame.collect_schema():
        if header == RECORD:
            continue
        name, colon, kind = header.rpartition(":")
        if not colon or kind not in ("token", "token_seq", "float", "float_seq"):
            raise DataError(
                f"{path}, line 1: a header is name:token, token_seq, float or float_seq, found "
                f'"{shown(header)}"; add the type'
            )
        cell = pl.col(header)
        columns.append((cell.str.split(" ") if kind.endswith("_seq") else cell).alias(name))
    return Part(path, part.frame.select(columns), part.place)
