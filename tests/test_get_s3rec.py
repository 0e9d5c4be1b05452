"""S3-Rec's files become atomic files, or one line says why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/get_s3rec.py"
FILES = {
    "Toys.txt": "7 3 1 2\n8 2 3\n",
    "Toys_item2attributes.json": '{"1": [4, 5, 4], "2": []}',
    "Toys_sample.txt": "7 5 6\n8 1 5\n",
}


def _convert(folder: Path, **changed: str | None) -> subprocess.CompletedProcess[str]:
    for name, text in {**FILES, **{k.replace("__", "."): v for k, v in changed.items()}}.items():
        if text is not None:
            (folder / name).write_text(text)
    command = [sys.executable, SCRIPT, folder / "out", "--from", folder / "Toys.txt"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_interactions_keep_their_order_and_items_their_attributes_once(tmp_path: Path) -> None:
    assert _convert(tmp_path).returncode == 0
    inter = (tmp_path / "out/toys.inter").read_text().splitlines()
    assert inter == ["user_id:token\titem_id:token", "7\t3", "7\t1", "7\t2", "8\t2", "8\t3"]
    item = (tmp_path / "out/toys.item").read_text().splitlines()
    assert item == ["item_id:token\tattributes:token_seq", "1\t4 5", "2\t"]
    candidates = pl.read_parquet(tmp_path / "out/toys.candidates.parquet")
    assert candidates.rows() == [("7", "5"), ("7", "6"), ("8", "1"), ("8", "5")]


def test_negatives_are_optional(tmp_path: Path) -> None:
    assert _convert(tmp_path, Toys_sample__txt=None).returncode == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["toys.inter", "toys.item"]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"Toys__txt": "7\n"}, "user 7 has no items; remove the line"),
        ({"Toys__txt": None}, "there is no such file; name the NAME.txt of S3-Rec"),
        ({"Toys_item2attributes__json": None}, "is missing; put it beside Toys.txt"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, changed: dict[str, str | None], line: str
) -> None:
    done = _convert(tmp_path, **changed)
    assert done.returncode == 2
    assert done.stderr.startswith("get_s3rec: ")
    assert done.stderr.rstrip().endswith(line)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out/toys.inter").exists()
