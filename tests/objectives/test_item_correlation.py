"""The most correlated item: by its definition, exactly, and from training alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.conftest import tiny_config
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.objectives import item_correlation
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.objectives.contrastive import ContrastiveObjective
from torchrec_pt.objectives.item_correlation import WINDOW, most_correlated


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _jagged(rows: list[list[int]]) -> Jagged:
    values = [item for row in rows for item in row]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return Jagged.from_lengths(torch.tensor(values, dtype=torch.int64), lengths)


def _most_correlated(rows: list[list[int]], num_items: int) -> list[int]:
    histories = _jagged(rows)
    counts = torch.bincount(histories.values, minlength=num_items)
    return most_correlated(histories, counts).tolist()


def _written_out(rows: list[list[int]], num_items: int) -> list[int]:
    found = []
    for item in range(num_items):
        best, most = item, 0.0
        for other in range(num_items):
            together = sum(
                any(
                    {row[a], row[b]} == {item, other}
                    for a in range(len(row))
                    for b in range(a + 1, min(a + WINDOW + 1, len(row)))
                )
                for row in rows
            )
            num = sum(other in row for row in rows)
            if other != item and together and together**2 / num > most:
                best, most = other, together**2 / num
        found.append(best)
    return found


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_it_is_the_largest_cosine_written_out(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(item_correlation, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, (30,), generator=generator).tolist()
    rows = [torch.randint(14, (n,), generator=generator).tolist() for n in lengths]
    assert _most_correlated(rows, 16) == _written_out(rows, 16)  # two items that nobody took


def test_an_item_that_stood_beside_no_other_stands_for_itself() -> None:
    assert _most_correlated([[2], [0, 1], [3, 3], []], 5) == [1, 0, 2, 3, 4]
    assert _most_correlated([], 2) == [0, 1]


def test_of_equally_correlated_items_the_lowest_is_taken() -> None:
    assert _most_correlated([[3, 0, 2], [1, 3], [1]], 4) == [2, 3, 0, 0]


def test_the_rarer_of_two_companions_is_nearer() -> None:
    # 0 stands beside each of 1 and 2 twice; 1 is everywhere.
    assert _most_correlated([[0, 1, 2], [2, 0, 1], [1], [1], [1]], 3)[0] == 2


def test_items_far_apart_in_a_history_are_not_together_and_histories_do_not_touch() -> None:
    between = list(range(2, 2 + WINDOW))
    assert _most_correlated([[0, *between, 1]], 12)[0] != 1
    assert _most_correlated([[0, *between[1:], 1]], 12)[0] == 1
    assert _most_correlated([[0], [1]], 2) == [0, 1]


def test_a_history_counts_once_however_often_it_repeats_a_pair() -> None:
    # 0 with 1 in one history, many times; with 2 in two.
    rows = [[0, 1, 0, 1, 0, 1], [0, 2], [2, 0]]
    assert _most_correlated(rows, 3)[0] == 2


def test_held_out_items_do_not_reach_it(cycle: PreparedDataset) -> None:
    views = {"name": "contrastive", "augmentations": ["substitute"]}
    config = tiny_config(cycle.path, pretrain={"objectives": [views]})
    items = torch.where(cycle.split > 0, 7, cycle.interactions.values)
    changed = replace(cycle, interactions=cycle.interactions.with_values(items))
    assert not torch.equal(items, cycle.interactions.values)
    tables = []
    for dataset in (cycle, changed):
        (objective,) = build_objectives(config, dataset)
        assert isinstance(objective, ContrastiveObjective)
        tables.append(objective.augment.most_correlated)
    assert tables[0] is not None
    assert tables[1] is not None
    assert torch.equal(tables[0], tables[1])
    # Users walk in a circle: some neighbour on it goes best with most items.
    assert (tables[0] != torch.arange(cycle.num_items)).all()


@pytest.mark.parametrize(
    "views", [{}, {"pairs": "user_item", "augmentations": ["substitute", "insert"]}]
)
def test_it_is_counted_only_for_what_needs_it(
    cycle: PreparedDataset, monkeypatch: pytest.MonkeyPatch, views: dict[str, object]
) -> None:
    monkeypatch.setattr("torchrec_pt.objectives.build.most_correlated", None)  # not to be called
    config = tiny_config(cycle.path, pretrain={"objectives": [{"name": "contrastive", **views}]})
    (objective,) = build_objectives(config, cycle)
    assert isinstance(objective, ContrastiveObjective)
    assert objective.augment.most_correlated is None
