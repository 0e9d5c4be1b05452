"""Pairs asked among all others of a user, and a share of the labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.conftest import embedded
from tests.tasks.test_pairs import built, pair_config, parts_of, rows_of_ids
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.tasks.labels import labelled

NAMES = pytest.mark.parametrize("name", ["ctr", "rating"])
EVERYTHING: dict[str, Any] = {"context": "others", "context_length": 99}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _rows_by_user(data: PreparedDataset, most_split: int) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(data.num_users)]
    for row, user in enumerate(data.interactions.rows.tolist()):
        if int(data.split[row]) <= most_split:
            found[user].add(row)
    return found


@NAMES
def test_asked_rows_and_their_history_are_all_of_a_users_training(
    scattered: PreparedDataset, name: str
) -> None:
    task, _ = built(pair_config(name, **EVERYTHING, targets_per_cut=3, cuts_per_user=2), scattered)
    trained = _rows_by_user(scattered, 0)
    items = scattered.interactions.values
    asked_ever: set[int] = set()
    for step in range(40):
        draw = task.draw(rows_of_ids(scattered, [3, -1, 0], step))
        targets = parts_of(draw.lookups["target"].with_values(draw.tensors["interaction"]))
        histories = parts_of(draw.lookups["history"])
        for user, asked, history in zip([3, -1, 0] * 2, targets, histories, strict=True):
            if user < 0:
                assert asked == history == []
                continue
            assert len(asked) == min(3, (len(trained[user]) + 2) // 3)
            others = sorted(trained[user] - set(asked))
            assert history == items[torch.tensor(others)].tolist()
            asked_ever |= set(asked) if user == 3 else set()
    assert asked_ever == trained[3]


@pytest.mark.parametrize(("split", "most"), [("valid", 0), ("test", 1)])
def test_a_held_out_row_knows_all_of_the_splits_before(
    scattered: PreparedDataset, split: Any, most: int
) -> None:
    task, _ = built(pair_config("rating", **EVERYTHING), scattered)
    asked = task.held_out(split)
    known = _rows_by_user(scattered, most)
    for user, history in zip(asked.users.tolist(), parts_of(asked.history(999)), strict=True):
        assert history == sorted(known[user])
    assert sorted(asked.interactions.tolist()) == asked.interactions.tolist()
    assert len(asked.interactions) == int((scattered.split == most + 1).sum())


@NAMES
@pytest.mark.parametrize("context", ["before", "others"])
def test_hidden_labels_are_neither_asked_nor_told(
    scattered: PreparedDataset, name: str, context: str
) -> None:
    config = pair_config(name, context=context, label_fraction=0.4, targets_per_cut=3)
    task, backbone = built(config, scattered)
    torch.nn.init.normal_(task.head.out.weight)
    is_hidden = ~labelled(scattered, 0.4, config.seed)
    rows = rows_of_ids(scattered, list(range(10)))
    drawn = task.draw(rows)
    assert not is_hidden[drawn.tensors["interaction"]].any()
    assert len(drawn.tensors["interaction"]) > 5
    asked = task.held_out("test")
    before = task.predict(
        backbone, embedded(task.draw_asked(asked), backbone.items.weight), asked.users
    )
    # Other labels in the hidden places change nothing of a task that is built anew.
    shuffled = torch.where(
        is_hidden & (scattered.split < 2), 6 - scattered.rating, scattered.rating
    )
    assert not torch.equal(shuffled, scattered.rating)
    vars(scattered)["rating"], kept = shuffled, scattered.rating
    try:
        again, _ = built(config, scattered)
    finally:
        vars(scattered)["rating"] = kept
    again.load_state_dict(task.state_dict())
    after = again.predict(
        backbone, embedded(again.draw_asked(asked), backbone.items.weight), asked.users
    )
    assert torch.equal(before, after)
    assert again.mean == task.mean


def test_a_larger_share_of_labels_holds_the_smaller(scattered: PreparedDataset) -> None:
    few, many, every = (labelled(scattered, share, 3) for share in (0.2, 0.5, 1.0))
    assert (many | ~few).all()
    assert every.all()
    # 0.5 of some 330 rows, ± 5 deviations of a binomial
    assert abs(int(many.sum()) - len(many) / 2) < 2.5 * len(many) ** 0.5
    assert not torch.equal(few, labelled(scattered, 0.2, 4))
