"""Jagged against a plain Python model, and the loaded dataset against the rows it came from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_pt.config import DataConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.prepare import prepare

lists = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=8)
examples = settings(max_examples=40, deadline=None)


def jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows], dtype=torch.int64))


def as_pairs(data: Jagged) -> Jagged:
    """The same rows of values (T, 2), so that nothing works for (T,) alone."""
    return data.with_values(torch.stack([data.values, data.values + 10], dim=1))


def timed(data: Jagged) -> Jagged:
    """Every value at a time that tells it."""
    return Jagged(data.values, data.offsets, 10.0 * data.values.double())


def has_own_times(data: Jagged) -> bool:
    return data.times is not None and torch.equal(data.times, 10.0 * data.values.double())


def plain(data: Jagged) -> list[list[Any]]:
    assert data.offsets.dtype == torch.int64
    assert data.offsets[-1] == len(data.values)
    ends = data.offsets.tolist()
    return [data.values[a:b].tolist() for a, b in pairwise(ends)]


@examples
@given(rows=lists)
def test_jagged_holds_its_rows(rows: list[list[int]]) -> None:
    data = jagged(rows)
    assert plain(data) == rows
    assert data.num_rows == len(rows)
    assert data.lengths.tolist() == [len(row) for row in rows]
    assert data.rows.tolist() == [i for i, row in enumerate(rows) for _ in row]


@examples
@given(rows=lists)
def test_positions_count_from_the_start_of_each_row(rows: list[list[int]]) -> None:
    assert jagged(rows).positions.tolist() == [place for row in rows for place in range(len(row))]


@examples
@given(rows=lists)
def test_with_values_keeps_the_rows(rows: list[list[int]]) -> None:
    data = jagged(rows)
    assert plain(data.with_values(-data.values)) == [[-value for value in row] for row in rows]
    assert plain(as_pairs(data)) == [[[value, value + 10] for value in row] for row in rows]


@examples
@given(parts=st.lists(lists, min_size=1, max_size=4))
def test_stack_puts_the_rows_of_one_part_after_those_of_another(
    parts: list[list[list[int]]],
) -> None:
    expected = [row for rows in parts for row in rows]
    assert plain(Jagged.stack([jagged(rows) for rows in parts])) == expected
    assert plain(Jagged.stack([as_pairs(jagged(rows)) for rows in parts])) == plain(
        as_pairs(jagged(expected))
    )


@examples
@given(rows=lists, data=st.data())
def test_windows_are_slices_of_the_rows(rows: list[list[int]], data: st.DataObject) -> None:
    starts = [data.draw(st.integers(0, len(row))) for row in rows]
    lengths = [
        data.draw(st.integers(0, len(row) - start)) for row, start in zip(rows, starts, strict=True)
    ]
    expected = [
        row[start : start + length]
        for row, start, length in zip(rows, starts, lengths, strict=True)
    ]
    where = torch.tensor(starts, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
    assert plain(jagged(rows).windows(*where)) == expected
    assert plain(as_pairs(jagged(rows)).windows(*where)) == plain(as_pairs(jagged(expected)))


@examples
@given(rows=lists.filter(bool), data=st.data())
def test_select_takes_rows_in_any_order_with_repeats(
    rows: list[list[int]], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    named = torch.tensor(chosen, dtype=torch.int64)
    expected = [rows[i] for i in chosen]
    assert plain(jagged(rows).select(named)) == expected
    assert plain(as_pairs(jagged(rows)).select(named)) == plain(as_pairs(jagged(expected)))


@examples
@given(rows=lists)
def test_to_sets_sorts_each_row_and_drops_repeats(rows: list[list[int]]) -> None:
    assert plain(jagged(rows).to_sets()) == [sorted(set(row)) for row in rows]


@examples
@given(rows=lists, max_length=st.integers(0, 7))
def test_tail_keeps_the_last_entries(rows: list[list[int]], max_length: int) -> None:
    expected = [row[max(0, len(row) - max_length) :] for row in rows]
    assert plain(jagged(rows).tail(max_length)) == expected
    assert plain(as_pairs(jagged(rows)).tail(max_length)) == plain(as_pairs(jagged(expected)))


@examples
@given(rows=lists)
def test_filter_keeps_every_row(rows: list[list[int]]) -> None:
    data = jagged(rows)
    expected = [[value for value in row if value > 4] for row in rows]
    assert plain(data.filter(data.values > 4)) == expected
    assert plain(as_pairs(data).filter(data.values > 4)) == plain(as_pairs(jagged(expected)))


@examples
@given(rows=lists.filter(bool), data=st.data())
def test_values_take_their_times_along(rows: list[list[int]], data: st.DataObject) -> None:
    all_ = timed(jagged(rows))
    some = st.lists(st.integers(0, len(rows) - 1), max_size=12)
    for taken in (
        all_.select(torch.tensor(data.draw(some), dtype=torch.int64)),
        all_.tail(2),
        all_.windows(0 * all_.lengths, all_.lengths.clamp(max=2)),
        all_.filter(all_.values > 4),
        Jagged.stack([all_, all_.tail(1)]),
        all_.to(torch.device("cpu")),
    ):
        assert has_own_times(taken)
    assert all_.with_values(all_.values + 1).times is all_.times
    assert all_.to_sets().times is None


def test_stacked_on_rows_with_times_those_without_have_unknown_ones() -> None:
    stacked = Jagged.stack([jagged([[1]]), timed(jagged([[2, 3]]))])
    assert stacked.times is not None
    assert stacked.times.isnan().tolist() == [True, False, False]
    assert stacked.times[1:].tolist() == [20, 30]
    assert Jagged.stack([jagged([[1]]), jagged([[2]])]).times is None


def test_jagged_refuses_wrong_shapes_and_dtypes() -> None:
    with pytest.raises(ValueError, match=r"Jagged.times: must be one a value, \(2,\), given"):
        Jagged(torch.zeros(2), torch.tensor([0, 2]), torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be \(R \+ 1,\)"):
        Jagged(torch.zeros(2), torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="int64"):
        Jagged(torch.zeros(2), torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="0 or more"):
        jagged([[1]]).tail(-1)


# --- the dataset --------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> PreparedDataset:
    """User 7 has items 30 10 20 40 in time order, user "5" has 10 50 only."""
    log = tmp_path / "log.csv"
    log.write_text("u,i,r,t\n7,10,2,2\n7,30,1,1\n5,10,5,1\n7,20,3,3\n7,40,4,4\n5,50,5,2\n")
    columns = {"user": "u", "item": "i", "rating": "r", "timestamp": "t"}
    config = DataConfig.model_validate({"format": "csv", "path": log, "columns": columns})
    prepare(config, tmp_path / "out", seed=0)
    return PreparedDataset.load(tmp_path / "out")


def external(dataset: PreparedDataset, rows: Jagged) -> list[list[int]]:
    return [dataset.items["external_id"].gather(row).to_list() for row in plain(rows)]


def test_histories_end_with_the_named_split(dataset: PreparedDataset) -> None:
    assert external(dataset, dataset.history("train")) == [[30, 10], [10, 50]]
    assert external(dataset, dataset.history("valid")) == [[30, 10, 20], [10, 50]]
    assert external(dataset, dataset.history("test")) == [[30, 10, 20, 40], [10, 50]]
    assert external(dataset, dataset.interactions) == external(dataset, dataset.history("test"))


def test_targets_are_exactly_the_named_split(dataset: PreparedDataset) -> None:
    assert external(dataset, dataset.targets("valid")) == [[20], []]
    assert external(dataset, dataset.targets("test")) == [[40], []]


def test_histories_know_when_their_items_were_taken(dataset: PreparedDataset) -> None:
    for through, times in {"train": [1, 2, 1, 2], "valid": [1, 2, 3, 1, 2]}.items():
        found = dataset.history(through).times  # type: ignore[arg-type]
        assert found is not None
        assert found.tolist() == times


def test_tensors_have_the_promised_types(dataset: PreparedDataset) -> None:
    assert dataset.interactions.values.dtype == torch.int64
    assert dataset.split.dtype == torch.int8
    assert dataset.rating is not None
    assert dataset.rating.dtype == torch.float32
    assert dataset.rating.tolist() == [1, 2, 3, 4, 5, 5]
    assert dataset.timestamp is not None
    assert dataset.timestamp.dtype == torch.float64
    assert dataset.label is None
    assert dataset.item_counts.tolist() == [2, 1, 1, 0, 0]
    assert dataset.item_counts.dtype == torch.int64
    assert (dataset.num_users, dataset.num_items) == (2, 5)
    assert (dataset.manifest.num_users, dataset.manifest.num_items) == (2, 5)


def test_interaction_features_stand_beside_the_interactions(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,t,hour,device\n7,10,2,22,tv\n5,10,1,11,\n7,30,1,21,car\n")
    features = [
        {"column": "hour", "of": "interaction", "kind": "numeric"},
        {"column": "device", "of": "interaction", "kind": "categorical"},
    ]
    raw = {"format": "csv", "path": log, "columns": {"timestamp": "t"}, "features": features}
    prepare(DataConfig.model_validate(raw), tmp_path / "out", seed=0)
    data = PreparedDataset.load(tmp_path / "out")
    assert external(data, data.interactions) == [[30, 10], [10]]
    assert data.interaction_features.rows() == [(21.0, "car"), (22.0, "tv"), (11.0, None)]
    assert data.interaction_features.schema == {"hour": pl.Float32, "device": pl.String}


def test_without_features_of_interactions_the_table_has_no_columns(
    dataset: PreparedDataset,
) -> None:
    assert dataset.interaction_features.columns == []


def test_ids_with_spaces_and_any_script_are_found_as_written(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    # The last two look alike: é is one character in the first, two in the second.
    users = ["Zoë van der Å", " 漢字 ", "🦊", "caf\u00e9", "cafe\u0301"]
    log.write_text("user_id,item_id\n" + "".join(f"{user},x y\n" for user in users))
    prepare(DataConfig.model_validate({"format": "csv", "path": log}), tmp_path / "out", seed=0)
    data = PreparedDataset.load(tmp_path / "out")
    assert [data.user_index(user) for user in users] == [0, 1, 2, 3, 4]
    assert data.item_index("x y") == 0
    with pytest.raises(DataError, match="did you mean"):
        data.user_index("漢字")


def test_integer_ids_are_found_by_number_and_by_text(dataset: PreparedDataset) -> None:
    assert dataset.user_index(7) == dataset.user_index("7") == 0
    assert dataset.item_index("10") == dataset.item_index(10) == 0
    for unknown in ("07", "+7", "seven", "", "٧", 2**70):
        with pytest.raises(DataError, match="ids are integers from 5 to 7"):
            dataset.user_index(unknown)


def test_unknown_text_id_names_the_nearest(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id\nalice,1\nbob,x2\n")
    config = DataConfig.model_validate({"format": "csv", "path": log})
    prepare(config, tmp_path / "out", seed=0)
    data = PreparedDataset.load(tmp_path / "out")
    assert data.item_index(1) == data.item_index("1") == 0
    with pytest.raises(DataError, match='did you mean "alice"'):
        data.user_index("alise")
