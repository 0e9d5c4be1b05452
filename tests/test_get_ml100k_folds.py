"""GroupLens' folds become atomic files with a split, or one line says why not."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from torchrec_pt.config import Columns, DataConfig, Feature, GivenSplit
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.prepare import prepare

SCRIPT = Path(__file__).parents[1] / "scripts/get_ml100k_folds.py"
FOLDS = ("u1", "u2", "u3", "u4", "u5")
# Not in the order of users, as in the original.
RATINGS = [
    (user, item, 1 + (user * item) % 5, 100 + user + item)
    for item in range(1, 6)
    for user in (3, 1, 2, 4)
]


def _rows(ratings: list[tuple[int, ...]]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in ratings)


@pytest.fixture
def grouplens(tmp_path: Path) -> Path:
    folder = tmp_path / "grouplens"
    folder.mkdir()
    genres = ("unknown", "Action", "Drama")
    (folder / "u.data").write_text(_rows(RATINGS))
    (folder / "u.genre").write_text("".join(f"{g}|{i}\n" for i, g in enumerate(genres)))
    (folder / "u.item").write_text(
        "".join(f"{i}|Film {i} (199{i})|01-Jan-199{i}||http://x|0|1|{i % 2}\n" for i in range(1, 6))
    )
    (folder / "u.user").write_text("".join(f"{u}|2{u}|F|writer|1000{u}\n" for u in range(1, 5)))
    for place, fold in enumerate(FOLDS):
        (folder / f"{fold}.test").write_text(_rows(sorted(RATINGS[place * 4 : place * 4 + 4])))
    return folder


def _convert(source: Path, target: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(target), "--from", str(source), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _splits(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for line in (folder / "ml-100k.inter").read_text().splitlines()[1:]:
        row, _, split = line.rpartition("\t")
        found[split].append(row)
    return found


def test_test_is_the_folds_own_and_valid_is_a_share_of_the_rest(
    grouplens: Path, tmp_path: Path
) -> None:
    assert _convert(grouplens, tmp_path / "out", "--valid", "0.25").returncode == 0
    for fold in FOLDS:
        splits = _splits(tmp_path / "out" / fold)
        test = (grouplens / f"{fold}.test").read_text().splitlines()
        assert sorted(splits["test"]) == sorted(test)
        assert sorted(chain(*splits.values())) == sorted(_rows(RATINGS).splitlines())
        assert len(splits["valid"]) == 4  # a quarter of 16


def test_rows_keep_the_order_of_the_ratings(grouplens: Path, tmp_path: Path) -> None:
    assert _convert(grouplens, tmp_path / "out").returncode == 0
    lines = (tmp_path / "out/u2/ml-100k.inter").read_text().splitlines()
    assert lines[0].split("\t")[-2:] == ["timestamp:float", "split:token"]
    assert [line.rpartition("\t")[0] for line in lines[1:]] == _rows(RATINGS).splitlines()


def test_the_draw_is_the_seeds_alone(grouplens: Path, tmp_path: Path) -> None:
    def valid(out: str, seed: str) -> list[str]:
        _convert(grouplens, tmp_path / out, "--valid", "0.5", "--seed", seed)
        return _splits(tmp_path / out / "u1")["valid"]

    assert valid("a", "0") == valid("b", "0") != valid("c", "1")


def test_a_fold_is_prepared_with_its_given_split_and_features(
    grouplens: Path, tmp_path: Path
) -> None:
    _convert(grouplens, tmp_path / "out", "--valid", "0.25")
    config = DataConfig(
        format="recbole",
        path=tmp_path / "out/u1",
        columns=Columns(rating="rating", timestamp="timestamp", split="split"),
        features=(
            Feature(column="class", of="item", kind="categorical"),
            Feature(column="gender", of="user", kind="categorical"),
        ),
        split=GivenSplit(rule="given"),
    )
    prepare(config, tmp_path / "prepared", seed=0)
    dataset = PreparedDataset.load(tmp_path / "prepared")
    counts = (dataset.manifest.num_train, dataset.manifest.num_valid, dataset.manifest.num_test)
    assert counts == (12, 4, 4)
    assert set(map(tuple, dataset.items["class"].to_list())) == {("Action",), ("Action", "Drama")}


@pytest.mark.parametrize(
    ("change", "more", "line"),
    [
        ("u3.test", (), "must hold GroupLens' ml-100k, no u3.test there; name the unpacked folder"),
        ("u1.test", (), "found '9\\t9\\t9\\t9'; take all files from one ml-100k.zip"),
        ("", ("--valid", "1"), "must be between 0 and 1, given 1; 0.05 is usual"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    grouplens: Path, tmp_path: Path, change: str, more: tuple[str, ...], line: str
) -> None:
    if change == "u3.test":
        (grouplens / change).unlink()
    elif change == "u1.test":
        (grouplens / change).write_text(_rows([(9, 9, 9, 9)]))
    done = _convert(grouplens, tmp_path / "out", *more)
    assert done.returncode == 2
    assert done.stderr.startswith("get_ml100k_folds: ")
    assert done.stderr.rstrip().endswith(line)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out/u1").exists()
