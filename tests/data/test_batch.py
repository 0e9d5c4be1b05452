"""A step's lookup: each id once, and everyone gets the rows that they asked for."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import rows_of
from torchrec_pt.data.batch import Batch, Draw, assemble
from torchrec_pt.data.jagged import Jagged

NUM_ITEMS, DIM = 40, 3


def jagged(*rows: list[int]) -> Jagged:
    values = torch.tensor([item for row in rows for item in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


DRAWS = {
    "a": Draw({"history": jagged([7, 3, 7], [], [3]), "target": jagged([9], [9], [7])}),
    "b": Draw({"negatives": jagged([31, 3, 31, 0])}, {"label": torch.tensor([1.0])}),
}


def batch_of(catalogue: tuple[int, int] | None = None) -> Batch:
    return assemble(rows_of([2, 0, 1]), DRAWS, catalogue)


def test_each_id_is_looked_up_once_and_the_catalogue_follows() -> None:
    assert batch_of().ids.values().tolist() == [0, 3, 7, 9, 31]
    assert batch_of((5, 9)).ids.values().tolist() == [0, 3, 7, 9, 31, 5, 6, 7, 8]


@pytest.mark.parametrize("catalogue", [None, (5, 9), (5, 5)])
def test_every_segment_gets_the_rows_of_its_ids(catalogue: tuple[int, int] | None) -> None:
    table = torch.randn(NUM_ITEMS, DIM)
    batch = batch_of(catalogue)
    rows, of_catalogue = batch.split(table[batch.ids.values()])
    for owner, draw in DRAWS.items():
        found = batch.embedded(rows, owner)
        assert found.ids.keys() == draw.lookups.keys()
        for name, ids in draw.lookups.items():
            assert torch.equal(found.ids[name].values, ids.values)
            assert torch.equal(found.vectors[name].values, table[ids.values])
            assert torch.equal(found.vectors[name].offsets, ids.offsets)
        assert found.tensors.keys() == draw.tensors.keys()
    expected = table[:0] if catalogue is None else table[slice(*catalogue)]
    assert torch.equal(of_catalogue, expected)


def test_the_gradient_of_an_id_sums_over_its_entries_and_the_catalogue() -> None:
    table = torch.randn(NUM_ITEMS, DIM, requires_grad=True)
    batch = batch_of((5, 9))
    rows, of_catalogue = batch.split(table[batch.ids.values()])
    found = [batch.embedded(rows, owner) for owner in DRAWS]
    vectors = torch.cat([part.values for each in found for part in each.vectors.values()])
    weights = torch.arange(1.0, len(vectors) + 1)
    ((vectors.sum(1) * weights).sum() + 100 * of_catalogue.sum()).backward()
    assert table.grad is not None
    entries = [id for draw in DRAWS.values() for ids in draw.lookups.values() for id in ids.values]
    expected = torch.zeros(NUM_ITEMS)
    for item, weight in zip(entries, weights, strict=True):
        expected[item] += weight
    expected[5:9] += 100
    assert torch.equal(table.grad, expected[:, None].expand(-1, DIM))


def test_a_step_without_ids() -> None:
    batch = assemble(rows_of([0]), {"a": Draw({"history": jagged([])})}, None)
    rows, of_catalogue = batch.split(torch.zeros(0, DIM))
    assert rows.shape == of_catalogue.shape == (0, DIM)
    assert batch.embedded(rows, "a").vectors["history"].values.shape == (0, DIM)


def test_times_travel_with_their_segments_where_they_are_asked_for() -> None:
    histories = DRAWS["a"].lookups["history"]
    timed = Jagged(histories.values, histories.offsets, 10.0 * histories.values.double())
    draws = {**DRAWS, "a": Draw({"history": timed, "target": DRAWS["a"].lookups["target"]})}
    batch = assemble(rows_of([2, 0, 1]), draws, None, with_times=True).to(torch.device("cpu"))
    found = batch.embedded(torch.zeros(batch.num_distinct, DIM), "a")
    for part in (found.ids["history"], found.vectors["history"]):
        assert part.times is not None
        assert part.times.tolist() == [70, 30, 70, 30]
    assert found.ids["target"].times is None
    assert assemble(rows_of([2, 0, 1]), draws, None).times == {}


def test_it_moves_whole() -> None:
    moved = batch_of((5, 9)).to(torch.device("meta"))
    assert moved.places.is_meta
    assert moved.ids.values().is_meta
    assert moved.num_distinct == 5
