"""The columns that we take from a raw file: found, checked, and brought to their types."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import polars as pl

from torchrec_pt.config import DataConfig, Feature
from torchrec_pt.data.errors import DataError, reading, shown
from torchrec_pt.data.formats.part import RECORD, Part


@dataclass(frozen=True)
class Column:
    """A column to be read from `source` as `name`; `key` is where the configuration says so.

    An `optional` number may be an empty cell.
    """

    name: str
    source: str
    kind: Literal["id", "number", "raw"]
    key: str
    dtype: type[pl.DataType] = pl.Float32
    optional: bool = False


def interaction_columns(config: DataConfig) -> list[Column]:
    names = config.columns
    columns = [id_column("user", "user", config), id_column("item", "item", config)]
    # The position in a sequence is its time, whether or not the config asks for it.
    timestamp = names.timestamp or ("timestamp" if config.format == "sequence" else None)
    if timestamp:
        key = "data.columns.timestamp"
        columns.append(Column("timestamp", timestamp, "number", key, pl.Float64))
    if names.rating:
        columns.append(Column("rating", names.rating, "number", "data.columns.rating"))
    if names.label:
        columns.append(Column("label", names.label, "number", "data.columns.label"))
    if names.split:
        columns.append(Column("split", names.split, "raw", "data.columns.split"))
    reserved = ("row", "user", "item", "timestamp", "rating", "label", "split")
    return columns + feature_columns(config, "interaction", reserved)


def id_column(name: str, of: Literal["user", "item"], config: DataConfig) -> Column:
    source = config.columns.user if of == "user" else config.columns.item
    return Column(name, source, "id", f"data.columns.{of}")


def feature_columns(config: DataConfig, of: str, reserved: Sequence[str]) -> list[Column]:
    columns: list[Column] = []
    for feature in config.features:
        if feature.of != of:
            continue
        if feature.column in reserved or feature.column in [column.name for column in columns]:
            raise DataError(
                f'data.features: the name "{feature.column}" of a feature of {of} is taken; '
                "rename the raw column, or declare it once"
            )
        columns.append(_feature_column(feature))
    return columns


def _feature_column(feature: Feature) -> Column:
    kind: Literal["number", "raw"] = "number" if feature.kind == "numeric" else "raw"
    return Column(feature.column, feature.column, kind, "data.features", optional=True)


@dataclass(frozen=True)
class Typed:
    """A raw file under our names and types, after a pass that checked it.

    Attributes:
        integers: the id columns that hold integers alone, which fit Int64 and are written without
            sign or leading zeros.
    """

    frame: pl.LazyFrame
    num_rows: int
    integers: frozenset[str]


def typed_each(parts: list[Part], columns: list[Column]) -> list[Typed]:
    """Each part, all of one schema."""
    typed = [_typed(part, columns) for part in parts]
    empty = [one.frame.collect_schema().to_frame() for one in typed]
    common = pl.concat(empty, how="vertical_relaxed").schema
    return [replace(one, frame=one.frame.cast(common)) for one in typed]


def _typed(part: Part, columns: list[Column]) -> Typed:
    with reading(part.path):
        schema = part.frame.collect_schema()
    present = [name for name in schema if name != RECORD]
    for column in columns:
        if column.source not in present:
            near = difflib.get_close_matches(column.source, present, n=1, cutoff=0.5)
            hint = f'did you mean "{near[0]}"?' if near else "name one of them"
            raise DataError(
                f'{part.path}: no column "{column.source}", which {column.key} names; '
                f"it has {shown(', '.join(present), 400)}; {hint}"
            )
    cells = {column.name: _cell(part, column, schema[column.source]) for column in columns}
    frame = part.frame.select(cell.alias(name) for name, cell in cells.items())
    bad = {
        column: cells[column.name].is_null()
        & (pl.col(column.source).is_not_null() if column.optional else True)
        for column in columns
        if column.kind != "raw"
    }
    types = frame.collect_schema()
    ids = [column.name for column in columns if column.kind == "id"]
    with reading(part.path):
        # All in one pass: reading takes longer than looking.
        found = part.frame.select(
            pl.len().alias("num_rows"),
            pl.any_horizontal(False, *bad.values()).any().alias("any bad"),
            *(_are_integers(cells[name], types[name]).alias(f"integers {name}") for name in ids),
        ).collect(engine="streaming")
    if found["any bad"].item():
        raise _bad_cell(part, bad)
    integers = frozenset(name for name in ids if found[f"integers {name}"].item())
    return Typed(frame, found["num_rows"].item(), integers)


def _are_integers(ids: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if dtype == pl.Int64:
        return pl.lit(True)
    exact = ids.cast(pl.Int64, strict=False).cast(pl.String) == ids
    return exact.fill_null(False).all()


def _bad_cell(part: Part, bad: Mapping[Column, pl.Expr]) -> DataError:
    """The first row with a cell that is null after its conversion, and may not be."""
    with reading(part.path):
        row = (
            part.frame.filter(pl.any_horizontal(bad.values()))
            .head(1)
            .select(
                RECORD,
                *(flag.alias(f"bad {column.name}") for column, flag in bad.items()),
                *(pl.col(column.source).alias(f"cell {column.name}") for column in bad),
            )
            .collect(engine="streaming")
            .row(0, named=True)
        )
    column = next(column for column in bad if row[f"bad {column.name}"])
    cell = row[f"cell {column.name}"]
    what = "an id" if column.kind == "id" else "a finite number"
    given = "is empty" if cell in (None, "") else f'found "{shown(cell)}"'
    return DataError(
        f'{part.path}, {part.place(row[RECORD])}, column "{column.source}": '
        f"must be {what}, {given}; mend or remove it"
    )


def _cell(part: Part, column: Column, dtype: pl.DataType) -> pl.Expr:
    """A column in its final type; null where an id is empty or a number is none."""
    cell = pl.col(column.source)
    where = f'{part.path}, column "{column.source}"'
    if isinstance(dtype, pl.Categorical | pl.Enum):
        cell, dtype = cell.cast(pl.String), pl.String()
    if column.kind == "raw":
        return pl.when(cell != "").then(cell) if dtype == pl.String else cell
    if column.kind == "id":
        if dtype == pl.String:
            return pl.when(cell != "").then(cell)
        if dtype.is_integer():
            return cell.cast(pl.Int64 if _fits_int64(dtype) else pl.String)
        raise DataError(f"{where}: ids must be integers or strings, found {dtype}; cast them")
    if dtype in (pl.Date, pl.Datetime):
        number = cell.cast(pl.Datetime("us")).dt.epoch("us") / 1_000_000
    elif dtype == pl.String:
        number = cell.str.strip_chars().cast(pl.Float64, strict=False)
    elif dtype.is_numeric() or dtype == pl.Boolean:
        number = cell.cast(pl.Float64)
    else:
        raise DataError(f"{where}: must be numbers, found {dtype}; convert the column")
    number = number.cast(column.dtype)  # which may be too small for it, and then holds infinity
    return pl.when(number.is_finite()).then(number)


def _fits_int64(dtype: pl.DataType) -> bool:
    return dtype.is_integer() and dtype not in (pl.UInt64, pl.Int128)
