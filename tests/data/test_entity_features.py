"""Features as numbers against plain Python over the raw cells."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_pt.config import DataConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import EntityFeatures, Of, load_entity_features
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.prepare import prepare

KINDS = {
    "single": ("categorical", pl.String),
    "several": ("categorical", pl.List(pl.String)),
    "number": ("numeric", pl.Float64),
    "vector": ("vector", pl.List(pl.Float64)),
    "words": ("text", pl.String),
}
EMPTY = {"single": None, "several": None, "number": None, "vector": None, "words": None}


def load(
    rows: list[dict[str, Any]], of: Of = "interaction", declared: tuple[Of, ...] = ("interaction",)
) -> EntityFeatures:
    """Features of rows with a split and some of the columns in KINDS; row i stays row i.

    All rows are of one user in time order; each is of an item of its own.
    """
    columns = {"user_id": pl.String, "item_id": pl.Int64, "time": pl.Int64, "split": pl.String}
    columns |= {name: dtype for name, (_, dtype) in KINDS.items()}
    table = [
        {"user_id": "u", "item_id": i, "time": i, "split": "train", **EMPTY, **row}
        for i, row in enumerate(rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        pl.DataFrame(table, schema=columns).write_parquet(Path(folder) / "log.parquet")
        config = {
            "format": "parquet",
            "path": Path(folder) / "log.parquet",
            "columns": {"timestamp": "time", "split": "split"},
            "split": {"rule": "given"},
            "features": [
                {"column": name, "of": of, "kind": kind}
                for of in declared
                for name, (kind, _) in KINDS.items()
            ],
        }
        prepare(DataConfig.model_validate(config), Path(folder) / "out", 0)
        return load_entity_features(PreparedDataset.load(Path(folder) / "out"), of)


def plain(cells: Jagged) -> list[list[int]]:
    assert cells.values.dtype == torch.int64
    return [cells.values[a:b].tolist() for a, b in pairwise(cells.offsets.tolist())]


def vocabulary(cells: list[list[str | None]]) -> dict[str, int]:
    counts = Counter(value for cell in cells for value in cell if value is not None)
    ordered = sorted(counts, key=lambda value: (-counts[value], value))
    return {value: i for i, value in enumerate(ordered, start=1)}


words = st.sampled_from(["a", "b", "c", "é", "a b", "a|b"])
tables = st.lists(
    st.fixed_dictionaries(
        {
            "split": st.sampled_from(["train", "train", "valid", "test"]),
            "single": st.none() | words,
            "several": st.none() | st.lists(st.none() | words, max_size=4),
            "number": st.none() | st.integers(-400, 400).map(lambda n: n / 8),
            "vector": st.none() | st.lists(st.integers(-9, 9).map(float), min_size=3, max_size=3),
        }
    ),
    min_size=1,
    max_size=12,
).map(lambda rows: [{**rows[0], "split": "train"}, *rows[1:]])


@settings(max_examples=40, deadline=None)
@given(tables)
def test_every_cell_is_what_plain_python_makes_of_it(rows: list[dict[str, Any]]) -> None:
    features = load(rows)
    is_train = [row["split"] == "train" for row in rows]
    assert features.of == "interaction"
    assert features.num_rows == len(rows)
    for column in ("single", "several"):
        cells = [row[column] or [None] for row in rows]
        cells = [cell if isinstance(cell, list) else [cell] for cell in cells]
        known = vocabulary([cell for cell, seen in zip(cells, is_train, strict=True) if seen])
        expected = [[known.get(value, 0) for value in cell] for cell in cells]
        assert plain(features.categorical[column]) == expected
        assert features.num_values[column] == len(known) + 1

    numbers = np.array([math.nan if row["number"] is None else row["number"] for row in rows])
    seen = numbers[np.array(is_train) & ~np.isnan(numbers)]
    mean, std = (seen.mean(), seen.std() or 1.0) if len(seen) else (0.0, 1.0)
    expected_numbers = torch.from_numpy(np.nan_to_num((numbers - mean) / std)).float()
    # Eighths are exact in float32, in which prepare keeps numbers.
    torch.testing.assert_close(features.dense["number"], expected_numbers.unsqueeze(1))

    if all(row["vector"] is None for row in rows):
        assert features.skipped == ("vector", "words")
    else:
        vectors = np.array([row["vector"] or [0.0] * 3 for row in rows])
        given = np.array([row["vector"] is not None for row in rows]) & np.array(is_train)
        scale = np.sqrt((vectors[given] ** 2).sum(1).mean()) if given.any() else 1.0
        expected = torch.from_numpy(vectors / (scale or 1.0)).float()
        torch.testing.assert_close(features.dense["vector"], expected)
        assert features.skipped == ("words",)


def test_held_out_numbers_are_normalized_by_training_alone() -> None:
    train = [{"number": float(n)} for n in (1, 2, 3, 6)]
    held_out = [{"split": "test", "number": 1000.0}, {"split": "valid", "number": None}]
    got = load(train + held_out).dense["number"].squeeze(1)
    torch.testing.assert_close(got[:4].mean(), torch.tensor(0.0))
    torch.testing.assert_close(got[:4].std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(got[4], torch.tensor((1000 - 3) / math.sqrt(3.5)))
    assert got[5] == 0


def test_a_value_unseen_in_training_is_the_unknown_one() -> None:
    features = load(
        [
            {"single": "seen", "several": ["x", "y"]},
            {"split": "test", "single": "new", "several": ["y", "new", "x", None]},
            {"split": "test", "single": None, "several": []},
        ]
    )
    assert plain(features.categorical["single"]) == [[1], [0], [0]]
    assert plain(features.categorical["several"]) == [[1, 2], [2, 0, 1, 0], [0]]


def test_one_column_of_users_and_of_items_has_two_vocabularies() -> None:
    rows = [{"single": value} for value in ("a", "b", "b")]
    of_both: tuple[Of, ...] = ("user", "item")
    user, item = (load(rows, of, of_both).categorical["single"] for of in of_both)
    assert plain(user) == [[1]]  # of their first row
    assert plain(item) == [[2], [1], [1]]


def test_columns_without_a_training_value_do_no_harm() -> None:
    features = load([{}, {"split": "test", "single": "a", "several": ["a", "b"], "number": 7.0}])
    assert plain(features.categorical["single"]) == [[0], [0]]
    assert plain(features.categorical["several"]) == [[0], [0, 0]]
    assert features.num_values == {"single": 1, "several": 1}
    assert features.dense["number"].tolist() == [[0.0], [7.0]]
    assert features.skipped == ("vector", "words")


def test_users_and_items_stand_at_their_dense_ids(cycle_with_features: PreparedDataset) -> None:
    dataset = cycle_with_features
    users, items = (load_entity_features(dataset, of) for of in ("user", "item"))
    assert (users.num_rows, items.num_rows) == (dataset.num_users, dataset.num_items)
    assert list(users.dense) == ["age"]
    assert list(items.categorical) == ["colour", "kinds"]
    ages = torch.tensor([20 + int(name[1:]) for name in dataset.users["external_id"]])
    by_age = users.dense["age"].squeeze(1)[ages.argsort()]
    assert (by_age.diff() > 0).all()
    is_red = torch.tensor([int(name[1:]) % 3 > 0 for name in dataset.items["external_id"]])
    assert torch.equal(items.categorical["colour"].values == 1, is_red)
    lengths = [(2, 1, 1, 3)[int(name[1:]) % 4] for name in dataset.items["external_id"]]
    assert items.categorical["kinds"].lengths.tolist() == lengths


def test_without_features_only_the_rows_are_counted(cycle: PreparedDataset) -> None:
    for of, num_rows in (
        ("user", cycle.num_users),
        ("item", cycle.num_items),
        ("interaction", len(cycle.split)),
    ):
        features = load_entity_features(cycle, of)
        assert features.num_rows == num_rows
        assert features.categorical == features.dense == features.num_values == {}
        assert features.skipped == ()


def test_a_lost_vocabulary_is_one_line(
    cycle_with_features: PreparedDataset, tmp_path: Path
) -> None:
    moved = dataclasses.replace(cycle_with_features, path=tmp_path)
    with pytest.raises(DataError, match=r"damaged, .*; remove the folder and prepare it again"):
        load_entity_features(moved, "item")
