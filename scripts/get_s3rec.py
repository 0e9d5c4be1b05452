#!/usr/bin/env python3
"""Rewrite a data set that S3-Rec prepared (Beauty, LastFM …) as RecBole atomic files.

    .venv/bin/python scripts/get_s3rec.py data/beauty --from FOLDER/WITH/Beauty.txt

FOLDER holds NAME.txt (`user item item …`, in time order), NAME_item2attributes.json
(`{"item": [attributes]}`) and, where negatives were released, NAME_sample.txt
(`user item item …`). Writes NAME.inter, NAME.item and NAME.candidates.parquet, in small
letters. The files are those of https://github.com/RUCAIBox/CIKM2020-S3Rec, folder data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import polars as pl


class ConvertError(Exception):
    """The message is one line for the user."""


def read_sequences(path: Path) -> list[tuple[str, list[str]]]:
    """(user, items) of each line."""
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    short = [row[0] for row in rows if len(row) < 2]
    if short:
        raise ConvertError(f"{path}: user {short[0]} has no items; remove the line")
    return [(user, items) for user, *items in rows]


def convert(source: Path, target: Path) -> None:
    """Each file is written beside its place and renamed: none is ever half there."""
    if not source.is_file():
        raise ConvertError(f"--from {source}: there is no such file; name the NAME.txt of S3-Rec")
    name = source.stem
    attributes_file = source.with_name(f"{name}_item2attributes.json")
    if not attributes_file.is_file():
        raise ConvertError(f"{attributes_file}: is missing; put it beside {source.name}")
    histories = read_sequences(source)
    attributes = json.loads(attributes_file.read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)

    lines = [f"{user}\t{item}" for user, items in histories for item in items]
    _write(target / f"{name.lower()}.inter", ["user_id:token\titem_id:token", *lines])
    lines = [
        f"{item}\t{' '.join(map(str, dict.fromkeys(values)))}"
        for item, values in attributes.items()
    ]
    _write(target / f"{name.lower()}.item", ["item_id:token\tattributes:token_seq", *lines])

    released = source.with_name(f"{name}_sample.txt")
    if released.is_file():
        users, items = zip(*read_sequences(released), strict=True)
        path = target / f"{name.lower()}.candidates.parquet"
        beside = path.with_name(f".{path.name}.new")
        pl.DataFrame({"user": users, "item": items}).explode("item").write_parquet(beside)
        beside.replace(path)


def _write(path: Path, lines: list[str]) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the folder to write, e.g. data/beauty")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", required=True, help="S3-Rec's NAME.txt"
    )
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.target)
    except (ConvertError, OSError, ValueError) as error:
        print(f"get_s3rec: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.source.stem} is in {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
