"""Parquet."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from torchrec_pt.data.errors import reading
from torchrec_pt.data.formats.part import RECORD, Part


def open_parquet(path: Path) -> Part:
    with reading(path):
        frame = pl.scan_parquet(path, glob=False, row_index_name=RECORD)
        frame.collect_schema()
    return Part(path, frame, lambda record: f"row {record + 1}")
