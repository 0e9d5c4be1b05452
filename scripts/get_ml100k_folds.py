#!/usr/bin/env python3
"""MovieLens-100K's five folds u1 … u5 as RecBole atomic files, with the split as a column.

    .venv/bin/python scripts/get_ml100k_folds.py data/ml-100k-folds --from GROUPLENS

GROUPLENS is GroupLens' own folder (u.data, u.item, u.user, u.genre, u1.test … u5.test). Writes
TARGET/u1 … u5, each like data/ml-100k with a column `split`: test is u1.test, valid is drawn by a
fixed seed from the other rows of u.data (which are u1.base), train is what is left. Reads as

    data.path = "data/ml-100k-folds/u1"
    data.columns.split = "split"
    data.split = { rule = "given" }
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from get_ml100k import FetchError, read_grouplens, write

FOLDS = ("u1", "u2", "u3", "u4", "u5")


def read_rows(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="latin-1").splitlines() if line]


def split_column(rows: list[str], test: set[str], valid: float, seed: int) -> list[str]:
    """ "train", "valid" or "test" of each row; `valid` is a share of those that are no test."""
    base = [row for row in rows if row not in test]
    # random() gives the same numbers in every version of Python, sample() need not.
    draw = random.Random(seed)
    lots = [draw.random() for _ in base]
    order = sorted(range(len(base)), key=lots.__getitem__)
    drawn = {base[place] for place in order[: round(valid * len(base))]}
    return ["test" if row in test else "valid" if row in drawn else "train" for row in rows]


def convert(source: Path, target: Path, valid: float, seed: int) -> None:
    """The rows keep the order of u.data.

    Raises:
        FetchError: a file is missing, or a test row is none of u.data.
    """
    for name in ("u.data", "u.item", "u.user", "u.genre", *(f"{fold}.test" for fold in FOLDS)):
        if not (source / name).is_file():
            raise FetchError(
                f"--from {source}: must hold GroupLens' ml-100k, no {name} there; "
                "name the unpacked folder"
            )
    files = read_grouplens(source)
    header, *rows = files["ml-100k.inter"].decode().splitlines()
    tests = {fold: set(read_rows(source / f"{fold}.test")) for fold in FOLDS}
    for fold, test in tests.items():
        if foreign := sorted(test.difference(rows)):
            raise FetchError(
                f"{source / fold}.test: must hold rows of u.data, found {foreign[0]!r}; "
                "take all files from one ml-100k.zip"
            )
    for fold, test in tests.items():
        column = ["split:token", *split_column(rows, test, valid, seed)]
        lines = [f"{row}\t{cell}" for row, cell in zip([header, *rows], column, strict=True)]
        inter = ("\n".join(lines) + "\n").encode()
        write({**files, "ml-100k.inter": inter}, target / fold)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the folder to write, e.g. data/ml-100k-folds")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", required=True, help="GroupLens' folder"
    )
    parser.add_argument("--valid", type=float, default=0.05, help="share of the rest (0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    arguments = parser.parse_args()
    try:
        if not 0 < arguments.valid < 1:
            raise FetchError(
                f"--valid: must be between 0 and 1, given {arguments.valid:g}; 0.05 is usual"
            )
        convert(arguments.source, arguments.target, arguments.valid, arguments.seed)
    except (FetchError, OSError) as error:
        print(f"get_ml100k_folds: {error}", file=sys.stderr)
        return 2
    print(f"MovieLens-100K's folds are in {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
