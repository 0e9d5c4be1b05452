"""Raw interaction logs of every supported format, as lazy frames under our own column names."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import polars as pl

from torchrec_pt.config import DataConfig
from torchrec_pt.data.columns import (
    Typed,
    feature_columns,
    id_column,
    interaction_columns,
    typed_each,
)
from torchrec_pt.data.errors import DataError, reading, shown
from torchrec_pt.data.formats.delimited import open_delimited
from torchrec_pt.data.formats.movielens import open_movielens, open_movielens_side
from torchrec_pt.data.formats.parquet import open_parquet
from torchrec_pt.data.formats.part import Part
from torchrec_pt.data.formats.recbole import open_recbole
from torchrec_pt.data.formats.sequence import open_sequence
from torchrec_pt.data.sources import find_sources


@dataclass(frozen=True)
class RawData:
    """Raw data under our names, checked, and lazy.

    Attributes:
        files: the interactions, file by file and of one schema: `row` (position over all files),
            `user`, `item` (Int64 or String) and, where the config names them, `timestamp`
            (Float64), `rating`, `label` (Float32), `split` (String), then interaction features by
            their own names.
        num_rows: of all files together.
        users, items: feature columns, and what they belong to: `external_id`, without duplicates,
            where they come from a side file; `row` where they come from the interactions. None
            where no such feature is configured. Numeric features are Float32; the others are as
            the file has them (multi-valued ones may be lists).
        sources: every file that is read, sorted.
    """

    files: tuple[pl.LazyFrame, ...]
    num_rows: int
    users: pl.LazyFrame | None
    items: pl.LazyFrame | None
    sources: tuple[Path, ...]

    @property
    def interactions(self) -> pl.LazyFrame:
        """Of all files, one after the other."""
        return pl.concat(self.files)


def read_raw(config: DataConfig) -> RawData:
    """Open and check the raw data of a `data` section. Rows keep the order of the files.

    Ids are Int64 where every id (of interactions and side file together) is an integer that fits,
    written without sign or leading zeros; else String.

    Raises:
        DataError: a missing, empty or corrupt file, a missing column, a ragged line, an empty id,
            a rating, label, timestamp or numeric feature that is no finite number.
    """
    sources = find_sources(config)
    parts = [_open(config, path) for path in sources.interactions]
    files = typed_each(parts, interaction_columns(config))
    num_rows = sum(file.num_rows for file in files)
    if not num_rows:
        raise DataError(f"{config.path}: must hold interactions, has none; check data.path")
    users, user_type = _entities(config, "user", parts, sources.users, files)
    items, item_type = _entities(config, "item", parts, sources.items, files)
    begins = accumulate((file.num_rows for file in files), initial=0)
    numbered = tuple(
        file.frame.cast({"user": user_type, "item": item_type}).with_row_index("row", offset=begin)
        for file, begin in zip(files, begins, strict=False)
    )
    return RawData(numbered, num_rows, users, items, sources.files)


def _open(config: DataConfig, path: Path) -> Part:
    if config.format != "parquet":
        _refuse_compressed(path)
    match config.format:
        case "csv":
            return open_delimited(path, ",", quote='"')
        case "tsv":
            return open_delimited(path, "\t", quote='"')
        case "parquet":
            return open_parquet(path)
        case "movielens":
            return open_movielens(path)
        case "recbole":
            return open_recbole(path)
        case "sequence":
            return open_sequence(path)


def _refuse_compressed(path: Path) -> None:
    """polars would unpack it, but then no line could be named."""
    with reading(path), path.open("rb") as file:
        if file.read(4).startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):  # gzip, zstd
            raise DataError(f"{path}: must be plain text, is compressed; unpack it")


def _entities(
    config: DataConfig,
    of: Literal["user", "item"],
    parts: list[Part],
    side: Path | None,
    files: list[Typed],
) -> tuple[pl.LazyFrame | None, type[pl.DataType]]:
    """Features and their `external_id`, from the side file, or `row`, from the interactions; and
    the type of the ids of all files."""
    features = feature_columns(config, of, reserved=("external_id", "count", "row"))
    integers = all(of in file.integers for file in files)
    if not features:
        return None, _id_type(integers)
    if side is None:
        frames = [file.frame for file in typed_each(parts, features)]
        return pl.concat(frames).with_row_index("row"), _id_type(integers)
    part = open_recbole(side) if config.format == "recbole" else open_movielens_side(side)
    (typed,) = typed_each([part], [id_column("external_id", of, config), *features])
    with reading(side):
        twice = typed.frame.filter(pl.col("external_id").is_duplicated()).head(1).collect()
    if twice.height:
        name = shown(twice["external_id"][0])
        raise DataError(
            f'{side}: each {of} must stand on one line, "{name}" stands on several; '
            "remove the others"
        )
    dtype = _id_type(integers and "external_id" in typed.integers)
    return typed.frame.cast({"external_id": dtype}), dtype


def _id_type(are_integers: bool) -> type[pl.DataType]:
    return pl.Int64 if are_integers else pl.String
