"""Candidates of the sampled protocol: what is drawn, and what files may hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from torchrec_pt.candidates import draw_candidates, load_candidates, read_candidates
from torchrec_pt.config import Candidates
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.held_out import HeldOut, held_out

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _rows(jagged: Jagged) -> list[list[int]]:
    return [part.tolist() for part in jagged.values.split(jagged.lengths.tolist())]


def _asked(dataset: PreparedDataset) -> HeldOut:
    """The last three items that a user took as test targets, so that there are several."""
    targets = dataset.interactions.tail(3).to_sets()
    users = torch.arange(dataset.num_users)
    return HeldOut(users, targets.with_values(targets.values), targets)


def _with_history(dataset: PreparedDataset, rows: list[list[int]]) -> PreparedDataset:
    """These users, of whom each took these items, in the training split."""
    lengths = torch.tensor([len(row) for row in rows])
    items = torch.tensor([item for row in rows for item in row])
    return dataclasses.replace(
        dataset,
        user_ids=torch.arange(len(rows)),
        part_of_user=torch.zeros(len(rows), dtype=torch.int64),
        interactions=Jagged.from_lengths(items, lengths),
        split=torch.zeros(len(items), dtype=torch.int8),
    )


def _ask_once(num_users: int) -> HeldOut:
    one_each = Jagged(torch.zeros(num_users, dtype=torch.int64), torch.arange(num_users + 1))
    return HeldOut(torch.arange(num_users), one_each, one_each)


# --- drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 5, 15])
def test_every_target_gets_so_many_distinct_items_that_its_user_took_in_no_split(
    cycle: PreparedDataset, num: int
) -> None:
    asked = _asked(cycle)
    candidates, num_short = draw_candidates(cycle, asked, num, 0)
    taken = _rows(cycle.interactions)
    assert not num_short
    assert candidates.num_rows == len(asked.targets.values) > 2 * cycle.num_users
    for user, drawn in zip(asked.targets.rows.tolist(), _rows(candidates), strict=True):
        assert len(set(drawn)) == len(drawn) == num
        assert not set(drawn) & set(taken[user])
        assert set(drawn) <= set(range(cycle.num_items))


def test_candidates_depend_on_the_seed_and_on_the_place_of_the_target(
    cycle: PreparedDataset,
) -> None:
    asked = _asked(cycle)
    (first, _), (again, _), (other, _) = (
        draw_candidates(cycle, asked, 5, seed) for seed in (0, 0, 1)
    )
    assert _rows(first) == _rows(again)
    assert _rows(first) != _rows(other)
    of_user_0 = _rows(first)[: int(asked.targets.lengths[0])]
    assert len({tuple(drawn) for drawn in of_user_0}) == len(of_user_0) > 1


def test_a_rank_draws_for_its_users_what_one_process_draws(cycle: PreparedDataset) -> None:
    def by_target(dataset: PreparedDataset) -> dict[tuple[int, int], list[int]]:
        asked = _asked(dataset)
        drawn, _ = draw_candidates(dataset, asked, 9, 4)
        users = dataset.user_ids[asked.targets.rows].tolist()
        keys = zip(users, asked.targets.positions.tolist(), strict=True)
        return dict(zip(keys, _rows(drawn), strict=True))

    several: dict[tuple[int, int], list[int]] = {}
    for rank in range(3):
        several |= by_target(PreparedDataset.load(cycle.path, Ranks(rank, 3, 3, CPU)))
    assert several == by_target(cycle)


def test_the_items_left_are_equally_likely(cycle: PreparedDataset) -> None:
    num_users = 20_000
    dataset = _with_history(cycle, [[0, 7, 8]] * num_users)
    candidates, _ = draw_candidates(dataset, _ask_once(num_users), 9, 0)
    counts = torch.bincount(candidates.values, minlength=cycle.num_items).double()
    left = [item for item in range(cycle.num_items) if item not in (0, 7, 8)]
    assert counts.sum() == counts[left].sum()
    share = 9 / len(left)
    sigma = (num_users * share * (1 - share)) ** 0.5
    # Of 27 normal deviates the largest is above 4.5 once in 5 000 seeds.
    assert (counts[left] - num_users * share).abs().max() < 4.5 * sigma


def test_a_user_with_too_few_items_left_gets_all_of_them_and_it_is_said(
    cycle: PreparedDataset, ranks: Ranks
) -> None:
    everything = list(range(cycle.num_items))
    histories = [everything, everything[2:], everything[5:], everything[6:]]
    dataset = _with_history(cycle, histories)
    asked = _ask_once(len(histories))
    candidates, notice = load_candidates(Candidates(num=5), dataset, asked, ranks)
    found = [sorted(row) for row in _rows(candidates)]
    assert found[:3] == [[], [0, 1], [0, 1, 2, 3, 4]]
    assert len(found[3]) == 5
    assert notice == (
        "2 users have fewer than 5 items that they never took: each of their test items is "
        "ranked among all of these"
    )


def test_nobody_asked_is_no_candidates(cycle: PreparedDataset) -> None:
    nobody = torch.arange(0)
    none = cycle.interactions.select(nobody)
    candidates, num_short = draw_candidates(cycle, HeldOut(nobody, none, none), 5, 0)
    assert (candidates.num_rows, num_short) == (0, 0)


# --- given --------------------------------------------------------------------------------------


def _write(path: Path, rows: list[tuple[Any, Any]], names: tuple[str, str] = ("user", "item")):
    pl.DataFrame(rows, schema=list(names), orient="row").write_parquet(path)


def _given(dataset: PreparedDataset, users: Tensor) -> list[tuple[str, str]]:
    """Three items for each user, in no order."""
    return [
        (dataset.users["external_id"][user], dataset.items["external_id"][(5 * user + n) % 30])
        for n in (2, 0, 1)
        for user in users.tolist()
    ]


def test_given_candidates_are_set_against_each_target_of_the_user(
    cycle: PreparedDataset, ranks: Ranks, tmp_path: Path
) -> None:
    asked = _asked(cycle)
    _write(tmp_path / "c.parquet", [*_given(cycle, asked.users), ("a stranger", "i0")])
    config = Candidates(path=tmp_path / "c.parquet")
    candidates, notice = load_candidates(config, cycle, asked, ranks)
    assert notice is None
    assert _rows(candidates) == [
        sorted((5 * user + n) % 30 for n in range(3)) for user in asked.targets.rows.tolist()
    ]


def test_unknown_candidates_are_dropped_and_counted_and_repeats_count_once(
    cycle: PreparedDataset, ranks: Ranks, tmp_path: Path
) -> None:
    asked = held_out(cycle, "test")
    rows = _given(cycle, asked.users)
    first = rows[0][0]
    unknown = [(first, "no such item"), (first, None), ("a stranger", "no such item")]
    _write(tmp_path / "c.parquet", [*rows, *rows, *unknown])
    config = Candidates(path=tmp_path / "c.parquet")
    candidates, notice = load_candidates(config, cycle, asked, ranks)
    assert candidates.lengths.tolist() == [3] * len(asked.users)
    assert notice == (
        f"{tmp_path}/c.parquet: 2 candidates are not in the catalogue and are left out"
    )


def test_ids_may_be_integers_or_the_strings_that_name_them(
    cycle: PreparedDataset, tmp_path: Path
) -> None:
    dataset = dataclasses.replace(cycle)
    items = cycle.items.with_columns(external_id=1000 + pl.int_range(pl.len()))
    users = cycle.users.with_columns(external_id=pl.int_range(pl.len()))
    vars(dataset).update(items=items, users=users)
    for name, rows in {
        "numbers": [(3, 1007), (3, 1002)],
        "texts": [("3", "1007"), ("3", "1002")],
    }.items():
        _write(tmp_path / name, rows)
        candidates, num_unknown = read_candidates(tmp_path / name, dataset, torch.tensor([3]))
        assert (_rows(candidates), num_unknown) == ([[2, 7]], 0)


def test_a_file_that_cannot_be_used_is_one_line(cycle: PreparedDataset, tmp_path: Path) -> None:
    asked = held_out(cycle, "test")
    path = tmp_path / "c.parquet"

    def refusal() -> str:
        with pytest.raises(DataError) as caught:
            read_candidates(path, cycle, asked.users)
        (line,) = str(caught.value).splitlines()
        return line

    assert refusal() == f"evaluate.candidates.path: there is no file {path}; check the path"
    path.write_text("user,item\nu0,i0\n")
    assert refusal().startswith(f"evaluate.candidates.path: {path} is no Parquet file")
    rows = _given(cycle, asked.users)
    _write(path, rows, ("user_id", "item"))
    assert refusal() == (
        f'{path}: candidates need the columns "user" and "item", found user_id, item; rename them'
    )
    _write(path, [(user, 1.5) for user, _ in rows])
    assert refusal() == (
        f'{path}: column "item" must hold strings or integers, found Float64; write the ids as in '
        "the log"
    )
    missing = rows[4][0]
    _write(path, [row for row in rows if row[0] != missing] + [(missing, "no such item")])
    assert refusal() == (
        f'{path}: no candidates for test user "{missing}"; add rows for every test user, or draw '
        "candidates by evaluate.candidates.num"
    )
