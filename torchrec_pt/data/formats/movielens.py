"""MovieLens: tabs and bars (100k), or double colons (1m, 10m); side files may be latin-1."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from torchrec_pt.data.errors import reading
from torchrec_pt.data.formats.lines import open_fields
from torchrec_pt.data.formats.part import RECORD, Part

# Of either form: what a folder of it holds.
INTERACTIONS = ("u.data", "ratings.dat")

# The order of the flags in u.item.
# fmt: off
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)
# fmt: on


def side_files(path: Path) -> tuple[Path, Path]:
    """Where the features of users and of items would stand."""
    names = ("users.dat", "movies.dat") if _has_double_colons(path) else ("u.user", "u.item")
    return path.with_name(names[0]), path.with_name(names[1])


def open_movielens(path: Path) -> Part:
    separator = "::" if _has_double_colons(path) else "\t"
    return open_fields(path, separator, ["user_id", "item_id", "rating", "timestamp"])


def open_movielens_side(path: Path) -> Part:
    """Users as the file has them; items with `release_year` and a list of `genres`."""
    with reading(path):
        lines = _decode_lines(path)
    match path.name:
        case "u.user":
            names = ["user_id", "age", "gender", "occupation", "zip_code"]
            return open_fields(path, "|", names, lines)
        case "users.dat":
            names = ["user_id", "gender", "age", "occupation", "zip_code"]
            return open_fields(path, "::", names, lines)
        case "u.item":
            names = ["item_id", "title", "date", "video_date", "url", *_GENRES]
            part = open_fields(path, "|", names, lines)
            flags = [pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in _GENRES]
            genres = pl.concat_list(flags).list.drop_nulls()
            year = pl.col("date").str.extract(r"(\d{4})$")
        case _:
            part = open_fields(path, "::", ["item_id", "title", "genres"], lines)
            genres = pl.col("genres").str.split("|")
            year = pl.col("title").str.extract(r"\((\d{4})\)\s*$")
    columns = [RECORD, "item_id", "title", year.alias("release_year"), genres.alias("genres")]
    return Part(path, part.frame.select(columns), part.place)


def _has_double_colons(path: Path) -> bool:
    with path.open("rb") as file:
        return b"::" in file.readline()


def _decode_lines(path: Path) -> pl.LazyFrame:
    """Like `scan_lines`, for small files that may be latin-1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    return pl.LazyFrame({"line": text.split("\n")}).with_row_index(RECORD)
