#!/usr/bin/env python3
"""Get MovieLens-100K as RecBole atomic files.

    .venv/bin/python scripts/get_ml100k.py data/ml-100k
    .venv/bin/python scripts/get_ml100k.py data/ml-100k --from MY_COPY

Writes ml-100k.inter, ml-100k.user and ml-100k.item, taken from the recbole package on
PyPI, which carries them as an example. MY_COPY is a folder with the three files, that
package's wheel, or GroupLens' own folder (u.data, u.item, u.user), which is rewritten.
Files that are already there and intact are kept.

The data are GroupLens' (https://grouplens.org/datasets/movielens/100k/); their terms of
use apply.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
FOLDER_IN_WHEEL = "recbole/dataset_example/ml-100k"
FILES_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}


class FetchError(Exception):
    """The message is one line for the user."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_complete(folder: Path) -> bool:
    return all(
        (folder / name).is_file() and sha256((folder / name).read_bytes()) == digest
        for name, digest in FILES_SHA256.items()
    )


def read_grouplens(folder: Path) -> dict[str, bytes]:
    """u.data, u.item, u.user and u.genre as atomic files; the year leaves the title."""

    def cells(name: str, separator: str) -> list[list[str]]:
        lines = (folder / name).read_text(encoding="latin-1").splitlines()
        return [line.split(separator) for line in lines if line]

    genres = [row[0] for row in cells("u.genre", "|")]
    items = []
    for item, title, _, _, _, *flags in cells("u.item", "|"):
        name, year = re.fullmatch(r"(.*?)(?: \((\d{4})\))?\s*", title).groups()
        taken = [genre for genre, flag in zip(genres, flags, strict=True) if flag == "1"]
        items.append([item, name, year or "unknown", " ".join(taken)])
    headers = {
        "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float",
        "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
        "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
    }
    rows = [cells("u.data", "\t"), cells("u.user", "|"), items]
    return {
        name: ("\n".join([header, *("\t".join(row) for row in table)]) + "\n").encode()
        for (name, header), table in zip(headers.items(), rows, strict=True)
    }


def read_folder(folder: Path) -> dict[str, bytes]:
    if (folder / "u.data").is_file():
        return read_grouplens(folder)
    missing = [name for name in FILES_SHA256 if not (folder / name).is_file()]
    if missing:
        raise FetchError(
            f"{folder}: must hold {', '.join(FILES_SHA256)} (or u.data, u.item, u.user, u.genre); "
            f"no {missing[0]} there"
        )
    return {name: (folder / name).read_bytes() for name in FILES_SHA256}


def read_wheel(wheel: Path) -> dict[str, bytes]:
    if sha256(wheel.read_bytes()) != WHEEL_SHA256:
        raise FetchError(f"{wheel}: is not the wheel of {WHEEL} (its SHA-256 differs)")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(f"{FOLDER_IN_WHEEL}/{name}") for name in FILES_SHA256}


def download() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        done = subprocess.run(
            [*command, "--only-binary=:all:", "-d", folder, WHEEL],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise FetchError(f"pip could not download {WHEEL} ({reason}); give a copy by --from")
        return read_wheel(wheels[0])


def read_copy(source: Path) -> dict[str, bytes]:
    if source.is_dir():
        return read_folder(source)
    if source.is_file():
        return read_wheel(source)
    raise FetchError(f"--from {source}: there is no such file or folder")


def write(files: dict[str, bytes], folder: Path) -> None:
    """Each file is written beside its place and renamed: none is ever half there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        beside = folder / f".{name}.new"
        beside.write_bytes(data)
        beside.replace(folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the folder to write, e.g. data/ml-100k")
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help="your own copy")
    arguments = parser.parse_args()
    try:
        if arguments.source is not None:
            write(read_copy(arguments.source), arguments.target)
        elif not is_complete(arguments.target):
            write(download(), arguments.target)
    except (FetchError, OSError) as error:
        print(f"get_ml100k: {error}", file=sys.stderr)
        return 2
    print(f"MovieLens-100K is in {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
