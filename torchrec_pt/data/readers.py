"""Raw interaction logs of every supported format, as lazy frames under our own column names."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import polars as pl

from torchrec_pt.config import DataConfig
from torchrec_pt.data.columns import (
    feature_columns,
    id_column,
    interaction_columns,
    typed_all,
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
    heights = [file.select(pl.len()).collect(engine="streaming").item() for file in files]
    if not sum(heights):
        raise DataError(f"{config.path}: must hold interactions, has none; check data.path")
    users = _entities(config, "user", parts, sources.users)
    items = _entities(config, "item", parts, sources.items)
    files, users = _unify_ids(files, "user", users)
    files, items = _unify_ids(files, "item", items)
    begins = accumulate(heights, initial=0)
    numbered = tuple(
        file.with_row_index("row", offset=begin) for file, begin in zip(files, begins, strict=False)
    )
    return RawData(numbered, sum(heights), users, items, sources.files)


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
    config: DataConfig, of: Literal["user", "item"], parts: list[Part], side: Path | None
) -> pl.LazyFrame | None:
    """Features and their `external_id`, from the side file, or `row`, from the interactions."""
    features = feature_columns(config, of, reserved=("external_id", "count", "row"))
    if not features:
        return None
    if side is None:
        return typed_all(parts, features).with_row_index("row")
    part = open_recbole(side) if config.format == "recbole" else open_movielens_side(side)
    frame = typed_all([part], [id_column("external_id", of, config), *features])
    with reading(side):
        twice = frame.filter(pl.col("external_id").is_duplicated()).head(1).collect()
    if twice.height:
        name = shown(twice["external_id"][0])
        raise DataError(
            f'{side}: each {of} must stand on one line, "{name}" stands on several; '
            "remove the others"
        )
    return frame


def _unify_ids(
    files: list[pl.LazyFrame], of: Literal["user", "item"], entities: pl.LazyFrame | None
) -> tuple[list[pl.LazyFrame], pl.LazyFrame | None]:
    """Cast the ids of all frames to Int64 where that loses nothing ("007" would), else String."""
    integers = all(_are_integers(file, of) for file in files)
    has_ids = entities is not None and "external_id" in entities.collect_schema()
    if entities is not None and has_ids:
        integers = integers and _are_integers(entities, "external_id")
    dtype = pl.Int64 if integers else pl.String
    if entities is not None and has_ids:
        entities = entities.with_columns(pl.col("external_id").cast(dtype))
    return [file.with_columns(pl.col(of).cast(dtype)) for file in files], entities


def _are_integers(frame: pl.LazyFrame, name: str) -> bool:
    if frame.collect_schema()[name] == pl.Int64:
        return True
    text = pl.col(name)
    exact = text.cast(pl.Int64, strict=False).cast(pl.String) == text
    return bool(frame.select(exact.fill_null(False).all()).collect(engine="streaming").item())
