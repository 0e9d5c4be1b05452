"""Raw interaction logs of every supported format, as lazy frames under our own column names.

Each format becomes a list of parts (one file each, cells still as the file has them); what
follows, the checks and the types, is common to all.
"""

from __future__ import annotations

import csv
import difflib
import glob
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from torchrec_pt.config import DataConfig, Feature
from torchrec_pt.data.manifest import DataError

# Record number inside one file; a name that no raw file is likely to use.
_RECORD = "__record__"

_SUFFIXES = {
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet", ".pq"),
    "sequence": (".txt",),
    "recbole": (".inter",),
}

# The order of the flags in u.item.
# fmt: off
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)
# fmt: on


@dataclass(frozen=True)
class RawData:
    """Raw data under our names, checked, and lazy.

    Attributes:
        interactions: `row` (position over all files), `user`, `item` (Int64 or String) and, where
            the config names them, `timestamp` (Float64), `rating`, `label` (Float32), `split`
            (String), then interaction features by their own names.
        users, items: `external_id`, of the type of `user` or `item` and without duplicates, and
            feature columns; None where no such feature is configured. Numeric features are
            Float32; the others are as the file has them (multi-valued ones may be lists).
        sources: every file that is read, sorted.
    """

    interactions: pl.LazyFrame
    users: pl.LazyFrame | None
    items: pl.LazyFrame | None
    sources: tuple[Path, ...]


@dataclass(frozen=True)
class Sources:
    """The files behind a `data` section; `users` and `items` only where features come from them."""

    interactions: tuple[Path, ...]
    users: Path | None = None
    items: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        sides = [path for path in (self.users, self.items) if path]
        return tuple(sorted({*self.interactions, *sides}))


@dataclass(frozen=True)
class _Part:
    """One file: its own columns and `_RECORD`; `place` says where a record is ("line 7")."""

    path: Path
    frame: pl.LazyFrame
    place: Callable[[int], str]


@dataclass(frozen=True)
class _Column:
    """A column to be read from `source` as `name`. An `optional` number may be an empty cell."""

    name: str
    source: str
    kind: Literal["id", "number", "raw"]
    dtype: type[pl.DataType] = pl.Float32
    optional: bool = False


def read_raw(config: DataConfig) -> RawData:
    """Open and check the raw data of a `data` section. Rows keep the order of the files.

    Ids are Int64 where every id (of interactions and side file together) is an integer that fits,
    written without sign or leading zeros; else String.

    Raises:
        DataError: a missing, empty or corrupt file, a missing column, a ragged line, an empty id,
            a rating, label, timestamp or numeric feature that is no finite number.
    """
    sources = find_sources(config)
    parts = [_open_interactions(config, path) for path in sources.interactions]
    interactions = _typed_all(parts, _interaction_columns(config))
    if not interactions.select(pl.len()).collect(engine="streaming").item():
        raise DataError(f"{config.path}: must hold interactions, has none; check data.path")
    users = _entities(config, "user", parts, sources.users)
    items = _entities(config, "item", parts, sources.items)
    interactions, users = _unify_ids(interactions, "user", users)
    interactions, items = _unify_ids(interactions, "item", items)
    return RawData(interactions.with_row_index("row"), users, items, sources.files)


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


# --- files --------------------------------------------------------------------------------------


def find_sources(config: DataConfig) -> Sources:
    """The files that `read_raw` will read.

    Raises:
        DataError: nothing is there, or nothing of the format.
    """
    path = config.path
    if not path.exists():
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files:
            rule = "matches no file" if glob.has_magic(str(path)) else "does not exist"
            raise DataError(f"data.path: {path} {rule}; check the path")
    elif path.is_dir():
        if config.format == "movielens":
            wanted = [path / "u.data", path / "ratings.dat"]
            files = [file for file in wanted if file.is_file()][:1]
            rule = "u.data or ratings.dat"
        else:
            suffixes = _SUFFIXES[config.format]
            files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in suffixes)
            rule = " or ".join(suffixes)
        if not files:
            raise DataError(f"data.path: {path} holds no {rule} file; check data.format and path")
    else:
        files = [path]
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: must hold interactions, is empty; remove or replace it")
    users, items = _side_files(config, files)
    return Sources(tuple(files), users, items)


def _side_files(config: DataConfig, files: list[Path]) -> tuple[Path | None, Path | None]:
    """Where user and item features live; None means in the interactions themselves."""
    if config.format not in ("movielens", "recbole"):
        return None, None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"data.path: {config.format} is one file, found {names}; name one of them")
    if config.format == "recbole":
        users, items = files[0].with_suffix(".user"), files[0].with_suffix(".item")
    elif _has_double_colons(files[0]):
        users, items = files[0].with_name("users.dat"), files[0].with_name("movies.dat")
    else:
        users, items = files[0].with_name("u.user"), files[0].with_name("u.item")
    of = {feature.of for feature in config.features}
    return (
        users if "user" in of and users.is_file() else None,
        items if "item" in of and items.is_file() else None,
    )


def _has_double_colons(path: Path) -> bool:
    with path.open("rb") as file:
        return b"::" in file.readline()


# --- formats ------------------------------------------------------------------------------------


def _open_interactions(config: DataConfig, path: Path) -> _Part:
    match config.format:
        case "csv":
            return _open_delimited(path, ",", quote='"')
        case "tsv":
            return _open_delimited(path, "\t", quote='"')
        case "parquet":
            with reading(path):
                frame = pl.scan_parquet(path, glob=False, row_index_name=_RECORD)
                frame.collect_schema()
            return _Part(path, frame, lambda record: f"row {record + 1}")
        case "movielens":
            separator = "::" if _has_double_colons(path) else "\t"
            return _open_fields(path, separator, ["user_id", "item_id", "rating", "timestamp"])
        case "recbole":
            return _open_recbole(path)
        case "sequence":
            return _open_sequence(path)


def _open_side(config: DataConfig, path: Path) -> _Part:
    if config.format == "recbole":
        return _open_recbole(path)
    with reading(path):
        lines = _decode_lines(path)
    match path.name:
        case "u.user":
            names = ["user_id", "age", "gender", "occupation", "zip_code"]
            return _open_fields(path, "|", names, lines)
        case "users.dat":
            names = ["user_id", "gender", "age", "occupation", "zip_code"]
            return _open_fields(path, "::", names, lines)
        case "u.item":
            names = ["item_id", "title", "date", "video_date", "url", *_GENRES]
            part = _open_fields(path, "|", names, lines)
            flags = [pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in _GENRES]
            genres = pl.concat_list(flags).list.drop_nulls()
            year = pl.col("date").str.extract(r"(\d{4})$")
        case _:
            part = _open_fields(path, "::", ["item_id", "title", "genres"], lines)
            genres = pl.col("genres").str.split("|")
            year = pl.col("title").str.extract(r"\((\d{4})\)\s*$")
    columns = [_RECORD, "item_id", "title", year.alias("release_year"), genres.alias("genres")]
    return _Part(path, part.frame.select(columns), part.place)


def _open_delimited(path: Path, separator: str, quote: str | None) -> _Part:
    with reading(path):
        frame = pl.scan_csv(
            path,
            separator=separator,
            quote_char=quote,
            infer_schema=False,  # strings: an id must not pass through a float
            glob=False,
            row_index_name=_RECORD,
        )
        names = [name for name in frame.collect_schema() if name != _RECORD]
    for name in names:
        if f"{name}_duplicated_0" in names:
            raise DataError(f'{path}: column "{name}" appears twice in the header; rename one')
    _check_field_counts(path, separator, quote, len(names))
    # A blank line is a record of nulls to polars.
    frame = frame.filter(pl.any_horizontal(pl.col(names).is_not_null()))
    return _Part(path, frame, lambda record: f"line {_line_of(path, separator, quote, record)}")


def _check_field_counts(path: Path, separator: str, quote: str | None, num_fields: int) -> None:
    """Find a ragged line: polars pads a short one with nulls without a word."""
    lines = _scan_lines(path)
    has_quotes = False
    if quote:
        with reading(path):
            quoted = lines.select(pl.col("line").str.contains(quote, literal=True).any())
            has_quotes = quoted.collect(engine="streaming").item()
    if quote and has_quotes:
        _check_quoted_field_counts(path, separator, quote, num_fields)
    else:
        _check_plain_field_counts(path, lines, separator, num_fields)


def _check_plain_field_counts(
    path: Path, lines: pl.LazyFrame, separator: str, num_fields: int
) -> None:
    found = pl.col("line").str.count_matches(separator, literal=True) + 1
    ragged = lines.filter((pl.col("line") != "") & (found != num_fields)).head(1)
    with reading(path):
        rows = ragged.select(_RECORD, found).collect(engine="streaming").rows()
    for record, count in rows:
        raise _ragged(path, record + 1, num_fields, count)


def _check_quoted_field_counts(path: Path, separator: str, quote: str, num_fields: int) -> None:
    line_number = 1
    try:
        for line_number, fields in _csv_records(path, separator, quote):
            if fields and len(fields) != num_fields:
                raise _ragged(path, line_number, num_fields, len(fields))
    except csv.Error as error:
        raise DataError(
            f"{path}, after line {line_number}: not valid CSV, {error}; check the quotes"
        ) from None


def _ragged(path: Path, line: int, expected: int, found: int) -> DataError:
    return DataError(
        f"{path}, line {line}: must have {expected} fields, has {found}; mend or remove the line"
    )


def _csv_records(path: Path, separator: str, quote: str | None) -> Iterator[tuple[int, list[str]]]:
    """Each record, header included, with the number of the line it starts on."""
    csv.field_size_limit(2**31 - 1)  # the default refuses long texts
    with path.open(encoding="utf-8-sig", newline="") as file:
        records = csv.reader(
            file,
            delimiter=separator,
            quotechar=quote,
            quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
            strict=True,
        )
        start = 1
        for fields in records:
            yield start, fields
            start = records.line_num + 1


def _line_of(path: Path, separator: str, quote: str | None, record: int) -> int:
    """The line that a record (0 = the first after the header) starts on; cells may hold breaks."""
    return next(itertools.islice(_csv_records(path, separator, quote), record + 1, None))[0]


def _open_recbole(path: Path) -> _Part:
    """Atomic file: a header of `name:type`, tabs, no quoting; `*_seq` cells hold several values."""
    part = _open_delimited(path, "\t", quote=None)
    columns = [pl.col(_RECORD)]
    for header in part.frame.collect_schema():
        if header == _RECORD:
            continue
        name, colon, kind = header.rpartition(":")
        if not colon or kind not in ("token", "token_seq", "float", "float_seq"):
            raise DataError(
                f"{path}, line 1: a header is name:token, token_seq, float or float_seq, found "
                f'"{header}"; add the type'
            )
        cell = pl.col(header)
        columns.append((cell.str.split(" ") if kind.endswith("_seq") else cell).alias(name))
    return _Part(path, part.frame.select(columns), part.place)


def _open_sequence(path: Path) -> _Part:
    """`user item item …`: the timestamp of an item is its position in the line."""
    lines = _scan_lines(path).with_columns(
        pl.col("line").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
    )
    words = pl.col("line")
    lines = lines.filter(words.list.first() != "")
    users = lines.select(_RECORD, user_id=words.list.first(), length=words.list.len())
    with reading(path):
        bad = users.filter((pl.col("length") < 2) | ~pl.col("user_id").is_first_distinct()).collect(
            engine="streaming"
        )
    if bad.height:
        record, user, length = bad.row(0)
        rule = "must name an item after the user" if length < 2 else "must be its user's only line"
        raise DataError(f'{path}, line {record + 1}: {rule}, user "{user}"; mend the line')
    frame = (
        lines.select(_RECORD, user_id=words.list.first(), item_id=words.list.slice(1))
        .with_columns(timestamp=pl.int_ranges(0, pl.col("item_id").list.len()))
        .explode("item_id", "timestamp")
    )
    return _Part(path, frame, lambda record: f"line {record + 1}")


def _open_fields(
    path: Path, separator: str, names: list[str], lines: pl.LazyFrame | None = None
) -> _Part:
    """Lines without header and quoting, cut at `separator`."""
    lines = _scan_lines(path) if lines is None else lines
    _check_plain_field_counts(path, lines, separator, len(names))
    fields = pl.col("line").str.split_exact(separator, len(names) - 1)
    fields = fields.struct.rename_fields(names).alias("fields")
    frame = lines.filter(pl.col("line") != "").select(_RECORD, fields).unnest("fields")
    return _Part(path, frame, lambda record: f"line {record + 1}")


def _scan_lines(path: Path) -> pl.LazyFrame:
    return pl.scan_lines(path, row_index_name=_RECORD, glob=False)


def _decode_lines(path: Path) -> pl.LazyFrame:
    """Like `_scan_lines`, for small files that may be latin-1, as some of MovieLens are."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    return pl.LazyFrame({"line": text.split("\n")}).with_row_index(_RECORD)


# --- columns ------------------------------------------------------------------------------------


def _interaction_columns(config: DataConfig) -> list[_Column]:
    names = config.columns
    columns = [_Column("user", names.user, "id"), _Column("item", names.item, "id")]
    # The position in a sequence is its time, whether or not the config asks for it.
    timestamp = names.timestamp or ("timestamp" if config.format == "sequence" else None)
    if timestamp:
        columns.append(_Column("timestamp", timestamp, "number", pl.Float64))
    if names.rating:
        columns.append(_Column("rating", names.rating, "number"))
    if names.label:
        columns.append(_Column("label", names.label, "number"))
    if names.split:
        columns.append(_Column("split", names.split, "raw"))
    reserved = ("row", "user", "item", "timestamp", "rating", "label", "split")
    return columns + _feature_columns(config, "interaction", reserved)


def _feature_columns(config: DataConfig, of: str, reserved: Sequence[str]) -> list[_Column]:
    columns: list[_Column] = []
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


def _feature_column(feature: Feature) -> _Column:
    kind: Literal["number", "raw"] = "number" if feature.kind == "numeric" else "raw"
    return _Column(feature.column, feature.column, kind, optional=True)


def _entities(
    config: DataConfig, of: Literal["user", "item"], parts: list[_Part], side: Path | None
) -> pl.LazyFrame | None:
    """`external_id` and features, from the side file or each entity's first interaction."""
    features = _feature_columns(config, of, reserved=("external_id", "count"))
    if not features:
        return None
    source = config.columns.user if of == "user" else config.columns.item
    columns = [_Column("external_id", source, "id"), *features]
    if side is None:
        frame = _typed_all(parts, columns)
        return frame.unique("external_id", keep="first", maintain_order=True)
    frame = _typed_all([_open_side(config, side)], columns)
    with reading(side):
        twice = frame.filter(pl.col("external_id").is_duplicated()).head(1).collect()
    if twice.height:
        raise DataError(
            f'{side}: each {of} must stand on one line, "{twice["external_id"][0]}" stands on '
            "several; remove the others"
        )
    return frame


def _typed_all(parts: list[_Part], columns: list[_Column]) -> pl.LazyFrame:
    return pl.concat([_typed(part, columns) for part in parts], how="vertical_relaxed")


def _typed(part: _Part, columns: list[_Column]) -> pl.LazyFrame:
    """The wanted columns of a part, under our names and types, after a pass that checks them."""
    with reading(part.path):
        schema = part.frame.collect_schema()
    present = [name for name in schema if name != _RECORD]
    for column in columns:
        if column.source not in present:
            near = difflib.get_close_matches(column.source, present, n=1, cutoff=0.5)
            hint = f'did you mean "{near[0]}"?' if near else "name one of them"
            raise DataError(
                f'{part.path}: no column "{column.source}"; it has {", ".join(present)}; {hint}'
            )
    cells = {column.name: _cell(part, column, schema[column.source]) for column in columns}
    checked = [column for column in columns if column.kind != "raw"]
    bad = {
        column.name: cells[column.name].is_null()
        & (pl.col(column.source).is_not_null() if column.optional else True)
        for column in checked
    }
    with reading(part.path):
        first_bad = (
            part.frame.filter(pl.any_horizontal(bad.values()))
            .head(1)
            .select(
                _RECORD,
                *(flag.alias(f"bad {name}") for name, flag in bad.items()),
                *(pl.col(column.source).alias(f"cell {column.name}") for column in checked),
            )
            .collect(engine="streaming")
        )
    for row in first_bad.iter_rows(named=True):
        column = next(column for column in checked if row[f"bad {column.name}"])
        cell = row[f"cell {column.name}"]
        what = "an id" if column.kind == "id" else "a finite number"
        given = "is empty" if cell in (None, "") else f'found "{cell}"'
        raise DataError(
            f'{part.path}, {part.place(row[_RECORD])}, column "{column.source}": '
            f"must be {what}, {given}; mend or remove it"
        )
    return part.frame.select(cell.alias(name) for name, cell in cells.items())


def _cell(part: _Part, column: _Column, dtype: pl.DataType) -> pl.Expr:
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
    return pl.when(number.is_finite()).then(number).cast(column.dtype)


def _fits_int64(dtype: pl.DataType) -> bool:
    return dtype.is_integer() and dtype not in (pl.UInt64, pl.Int128)


def _unify_ids(
    interactions: pl.LazyFrame, of: Literal["user", "item"], entities: pl.LazyFrame | None
) -> tuple[pl.LazyFrame, pl.LazyFrame | None]:
    """Cast the ids of both frames to Int64 where that loses nothing ("007" would), else String."""
    frames = [(interactions, of)] + ([(entities, "external_id")] if entities is not None else [])
    integers = all(_are_integers(frame, name) for frame, name in frames)
    dtype = pl.Int64 if integers else pl.String
    cast = [frame.with_columns(pl.col(name).cast(dtype)) for frame, name in frames]
    return cast[0], cast[1] if len(cast) > 1 else None


def _are_integers(frame: pl.LazyFrame, name: str) -> bool:
    if frame.collect_schema()[name] == pl.Int64:
        return True
    text = pl.col(name)
    exact = text.cast(pl.Int64, strict=False).cast(pl.String) == text
    return bool(frame.select(exact.fill_null(False).all()).collect(engine="streaming").item())
