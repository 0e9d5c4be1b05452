"""Losses of clicks, what they predict, and what is drawn beside clicks that stand alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tasks.test_pairs import built, pair_config, parts_of, rows_of_ids
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.tasks.ctr import CtrTask, focal_logit

CLICKS: dict[str, Any] = {
    "positive_rating": None,
    "negatives": {"num": 3, "distribution": "uniform"},
}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _task(data: PreparedDataset, **changes: Any) -> CtrTask:
    task, _ = built(pair_config("ctr", **changes), data)
    assert isinstance(task, CtrTask)
    return task


def _expected_loss(task: CtrTask, linked: Tensor, share: float) -> Tensor:
    """Of each logit, over labels that are 1 in this share."""
    one, none = (
        torch.stack([task.total_loss(x, torch.full((1,), y)) for x in linked.split(1)])
        for y in (1.0, 0.0)
    )
    return share * one + (1 - share) * none


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "bce"},
        {"loss": "weighted"},
        {"loss": "weighted", "positive_weight": 7.0},
        {"loss": "focal"},
        {"loss": "focal", "focal_gamma": 0.5, "focal_alpha": 0.25},
    ],
)
def test_the_best_logit_predicts_the_share_of_clicks(
    cycle: PreparedDataset, changes: dict[str, Any], share: float
) -> None:
    task = _task(cycle, **changes)
    linked = torch.linspace(-6, 6, 2401)
    best = linked[_expected_loss(task, linked, share).argmin()]
    # The grid's step is 0.005, and a minimum in float32 is flat.
    assert float(task.final(best)) == pytest.approx(share, abs=0.01)


def test_weights_and_focus_are_their_formulas(cycle: PreparedDataset) -> None:
    linked, labels = torch.tensor([0.3, -1.2]), torch.tensor([1.0, 0.0])
    p = torch.sigmoid(linked).tolist()
    focal = _task(cycle, loss="focal", focal_gamma=1.5, focal_alpha=0.3)
    expected = -0.3 * (1 - p[0]) ** 1.5 * math.log(p[0]) - 0.7 * p[1] ** 1.5 * math.log(1 - p[1])
    assert float(focal.total_loss(linked, labels)) == pytest.approx(expected, rel=1e-5)
    weighted = _task(cycle, loss="weighted", positive_weight=4.0)
    q = torch.sigmoid(linked + math.log(4)).tolist()
    expected = -4 * math.log(q[0]) - math.log(1 - q[1])
    assert float(weighted.total_loss(linked, labels)) == pytest.approx(expected, rel=1e-5)


def test_a_focus_of_zero_is_the_logit_itself() -> None:
    linked = torch.linspace(-9, 9, 19)
    torch.testing.assert_close(focal_logit(linked, gamma=0.0, alpha=0.5), linked)
    assert torch.isfinite(focal_logit(torch.tensor([-1e4, 1e4]), gamma=3.0, alpha=0.5)).all()


# --- clicks alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["before", "others"])
def test_beside_each_click_stand_items_that_the_user_has_not_in_training(
    cycle: PreparedDataset, context: str
) -> None:
    task = _task(cycle, **CLICKS, context=context, targets_per_cut=2)
    taken = [set(part) for part in parts_of(cycle.history("train"))]
    for step in range(10):
        drawn = task.draw(rows_of_ids(cycle, [4, -1, 9, 2], step))
        targets, marks = drawn.lookups["target"], drawn.tensors["interaction"]
        for user, items, interactions in zip(
            [4, -1, 9, 2], parts_of(targets), parts_of(targets.with_values(marks)), strict=True
        ):
            clicked = [i for i in interactions if i >= 0]
            assert bool(clicked) == (user >= 0)
            assert len(items) == 4 * len(clicked)
            assert items[: len(clicked)] == cycle.interactions.values[clicked].tolist()
            assert not taken[user] & set(items[len(clicked) :]) if user >= 0 else not items
        assert torch.equal(drawn.tensors["label"], (marks >= 0).float())
        assert drawn.tensors["history_label"].isnan().all()


def test_held_out_clicks_stand_beside_items_that_the_user_never_took(
    cycle: PreparedDataset,
) -> None:
    task = _task(cycle, **CLICKS)
    taken = [set(part) for part in parts_of(cycle.interactions)]
    asked, again = task.held_out("test"), task.held_out("test")
    assert torch.equal(asked.targets.values, again.targets.values)
    labels = task.labels_of(asked.interactions)
    assert float(labels.mean()) == 0.25
    for user, items, row in zip(
        asked.users.tolist(),
        parts_of(asked.targets),
        parts_of(asked.targets.with_values(asked.interactions)),
        strict=True,
    ):
        drawn = {item for item, interaction in zip(items, row, strict=True) if interaction < 0}
        assert drawn
        assert not taken[user] & drawn
    other = task.held_out("valid")
    assert not torch.equal(asked.targets.values, other.targets.values)


def test_the_start_of_clicks_alone_knows_what_is_popular(cycle: PreparedDataset) -> None:
    task = _task(cycle, **CLICKS)
    count = cycle.item_counts.double()
    beside = 3 * count.sum() / cycle.num_items
    expected = (count - 0.25 * (count + beside)) / (count + beside + task.shrinkage)
    got = task.item_biases(torch.arange(cycle.num_items))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    assert task.mean == 0.25


def test_negatives_beside_given_labels_are_refused(cycle: PreparedDataset) -> None:
    with pytest.raises(ValueError, match="the data says what was not clicked; drop negatives"):
        _task(cycle, negatives={"num": 3})
