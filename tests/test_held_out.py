"""Ranks, baselines and best items against full sorts and dense matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_config
from torchrec_pt import scoring
from torchrec_pt.baselines import ItemKnn, Popularity
from torchrec_pt.build import build_learner
from torchrec_pt.config import TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.held_out import HeldOut, held_out, rank_and_list, rank_targets
from torchrec_pt.metrics import ranking_metrics
from torchrec_pt.scoring import ModelScorer, top_items

NUM_USERS, NUM_ITEMS = 50, 17


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows], dtype=torch.int64))


def _rows(jagged: Jagged) -> list[list[int]]:
    return [part.tolist() for part in jagged.values.split(jagged.lengths.tolist())]


class _Scores:
    """Scores (num_users, num_items) as they are given; a query is a user."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores

    def queries(self, users: Tensor) -> Tensor:
        return users

    def scores(self, queries: Tensor, items: range) -> Tensor:
        return self._scores[queries, items.start : items.stop]


@pytest.fixture(autouse=True, params=[512, 5], ids=["one block", "blocks of 5"])
def _item_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 17 items in one block, and in blocks of which the last one is short."""
    monkeypatch.setattr(scoring, "ITEM_BLOCK", request.param)


def _rank(scores: Tensor, asked: HeldOut, num_items: int, ranks: Ranks, batch_size: int) -> Jagged:
    parts = torch.arange(len(asked.users)) // 10
    return rank_targets(_Scores(scores), asked, parts, num_items, ranks, batch_size)


def _asked(num_targets: int) -> tuple[Tensor, HeldOut]:
    """Scores with many ties; every other user is asked, with up to num_targets targets."""
    draw = np.random.default_rng(num_targets)
    scores = torch.from_numpy(draw.integers(0, 5, (NUM_USERS, NUM_ITEMS))).float()
    users = torch.arange(0, NUM_USERS, 2)
    seen, targets = [], []
    for _ in users:
        order = draw.permutation(NUM_ITEMS).tolist()
        num = int(draw.integers(1, num_targets + 1))
        targets.append(order[:num])
        seen.append(order[num : num + int(draw.integers(0, NUM_ITEMS - num + 1))])
    return scores, HeldOut(users, _jagged(seen), _jagged(targets))


def _full_sorts(scores: Tensor, asked: HeldOut) -> list[list[int]]:
    """Of each asked user all candidates, best first."""
    orders = []
    for user, seen, targets in zip(
        asked.users.tolist(), _rows(asked.seen), _rows(asked.targets), strict=True
    ):
        candidates = (set(range(NUM_ITEMS)) - set(seen)) | set(targets)
        row = scores[user].tolist()
        orders.append(sorted(candidates, key=lambda item, row=row: (-row[item], item)))
    return orders


def _naive_ranks(scores: Tensor, asked: HeldOut) -> list[list[int]]:
    orders = _full_sorts(scores, asked)
    return [
        [order.index(item) + 1 for item in targets]
        for order, targets in zip(orders, _rows(asked.targets), strict=True)
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("num_targets", [1, 6])
def test_ranks_are_those_of_a_full_sort(ranks: Ranks, num_targets: int, batch_size: int) -> None:
    scores, asked = _asked(num_targets)
    found = _rank(scores, asked, NUM_ITEMS, ranks, batch_size)
    assert _rows(found) == _naive_ranks(scores, asked)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("num_targets", [1, 6])
def test_ranks_among_candidates_are_those_of_a_full_sort(
    ranks: Ranks, num_targets: int, batch_size: int
) -> None:
    scores, asked = _asked(num_targets)
    draw = np.random.default_rng(9)
    # Any items, those seen and the targets among them; for some targets none, for some all.
    candidates = [
        draw.permutation(NUM_ITEMS)[: draw.integers(NUM_ITEMS + 1)].tolist()
        for _ in asked.targets.values
    ]
    parts = torch.arange(len(asked.users)) // 10
    block = (parts, NUM_ITEMS, ranks, batch_size)
    found = rank_and_list(_Scores(scores), asked, *block, candidates=_jagged(candidates))
    assert _rows(found.ranks) == _naive_ranks(scores, asked)
    expected = []
    for user, target, others in zip(
        asked.users[asked.targets.rows].tolist(),
        asked.targets.values.tolist(),
        candidates,
        strict=True,
    ):
        row = scores[user].numpy()
        listed = np.array(sorted({*others, target}))
        order = listed[np.lexsort((listed, -row[listed]))]
        expected.append(order.tolist().index(target) + 1)
    assert found.among.values.tolist() == expected
    assert torch.equal(found.among.offsets, asked.targets.offsets)


@pytest.mark.parametrize("k", [1, 4, NUM_ITEMS, NUM_ITEMS + 3])
def test_lists_are_the_heads_of_a_full_sort_however_many_candidates_there_are(
    ranks: Ranks, k: int
) -> None:
    scores, asked = _asked(6)
    scores -= 2  # 0 and −0 tie, and so do negative scores
    scores[::4] = torch.where(scores[::4] == 0, -0.0, scores[::4])
    scores[4, ::2] = -0.0
    parts = torch.arange(len(asked.users)) // 10
    found = rank_and_list(_Scores(scores), asked, parts, NUM_ITEMS, ranks, 7, k=k)
    orders = _full_sorts(scores, asked)
    assert _rows(found.lists) == [order[:k] for order in orders]
    assert min(map(len, orders)) < 4  # of somebody all candidates fit
    for order, places in zip(_rows(found.lists), _rows(found.ranks), strict=True):
        assert max(places) > k or len(order) >= max(places)


def test_a_target_that_was_seen_before_is_a_candidate(ranks: Ranks) -> None:
    scores = torch.tensor([[5.0, 4, 3, 2]])
    asked = HeldOut(torch.tensor([0]), _jagged([[0, 2]]), _jagged([[2]]))
    found = _rank(scores, asked, 4, ranks, 8)
    assert _rows(found) == [[2]]  # behind item 1; item 0 is hidden


def test_a_target_that_was_seen_before_stands_before_the_other_targets(ranks: Ranks) -> None:
    scores = torch.tensor([[5.0, 4, 3, 2]])
    asked = HeldOut(torch.tensor([0]), _jagged([[0]]), _jagged([[0, 1]]))
    found = _rank(scores, asked, 4, ranks, 8)
    assert _rows(found) == _naive_ranks(torch.nn.functional.pad(scores, (0, 13)), asked)


def test_a_model_of_nan_is_not_perfect(ranks: Ranks) -> None:
    _, asked = _asked(1)
    scores = torch.full((NUM_USERS, NUM_ITEMS), torch.nan)
    try:
        found = _rank(scores, asked, NUM_ITEMS, ranks, 8)
    except ValueError:
        return  # refusing is as good
    assert float(ranking_metrics(found, (1,))["hr@1"].mean()) < 1


def test_an_item_taken_twice_in_the_test_does_not_lift_ndcg_above_one(
    ranks: Ranks, cycle: PreparedDataset
) -> None:
    lengths = torch.zeros(cycle.num_users, dtype=torch.int64)
    lengths[0] = 4
    repeats = dataclasses.replace(
        cycle,
        interactions=Jagged.from_lengths(torch.tensor([3, 5, 7, 7]), lengths),
        split=torch.tensor([0, 1, 2, 2], dtype=torch.int8),
    )
    asked = held_out(repeats, "test")
    scores = torch.zeros(cycle.num_users, cycle.num_items)
    scores[:, 7] = 1
    found = _rank(scores, asked, cycle.num_items, ranks, 8)
    assert float(ranking_metrics(found, (10,))["ndcg@10"].max()) <= 1


@pytest.mark.parametrize(("split", "before"), [("valid", "train"), ("test", "valid")])
def test_held_out_hides_what_came_before_and_only_that(
    cycle: PreparedDataset, split: str, before: str
) -> None:
    asked = held_out(cycle, split)  # type: ignore[arg-type]
    assert (asked.targets.lengths == 1).all()
    all_items, history = _rows(cycle.interactions), _rows(cycle.history(before))  # type: ignore
    for user, seen, target in zip(
        asked.users.tolist(), _rows(asked.seen), _rows(asked.targets), strict=True
    ):
        assert seen == history[user]
        assert all_items[user][: len(seen) + 1] == seen + target
        assert len(all_items[user]) - len(seen) == (2 if split == "valid" else 1)


# --- baselines ----------------------------------------------------------------------------------


def test_popularity_gives_everyone_the_counts() -> None:
    counts = torch.tensor([9, 4, 4, 0])
    scorer = Popularity(counts)
    got = scorer.scores(scorer.queries(torch.arange(3)), range(1, 4))
    assert torch.equal(got, counts[1:].float().expand(3, 3))


def _histories() -> tuple[Jagged, Jagged]:
    """Training rows and asking rows with repeats, empty rows, and an item nobody took."""
    draw = np.random.default_rng(0)
    train = [draw.integers(0, NUM_ITEMS - 1, num).tolist() for num in draw.integers(0, 9, 60)]
    history = [[*row, int(draw.integers(NUM_ITEMS))] for row in train]
    return _jagged(train), _jagged(history)


def _binary(jagged: Jagged) -> np.ndarray:
    matrix = np.zeros((jagged.num_rows, NUM_ITEMS))
    matrix[jagged.rows.numpy(), jagged.values.numpy()] = 1
    return matrix


def _cosines(train: Jagged) -> np.ndarray:
    taken = _binary(train)
    norm = np.sqrt(taken.sum(0))
    return taken.T @ taken / np.maximum(np.outer(norm, norm), 1)


def test_item_knn_with_all_neighbours_is_the_sum_of_cosines(ranks: Ranks) -> None:
    train, history = _histories()
    users = torch.tensor([5, 0, 59, 5])
    scorer = ItemKnn(train, history, NUM_ITEMS, k=NUM_ITEMS)
    got = scorer.scores(scorer.queries(users), range(NUM_ITEMS))
    expected = (_binary(history) @ _cosines(train))[users.numpy()]
    # float64 sums, rounded to float32 at the end
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert _cosines(train).max() == pytest.approx(1)


def test_item_knn_keeps_the_k_most_similar_items_of_each_item(ranks: Ranks) -> None:
    train, _ = _histories()
    one_each = _jagged([[item] for item in range(NUM_ITEMS)])
    scorer = ItemKnn(train, one_each, NUM_ITEMS, k=3)
    parts = [
        scorer.scores(scorer.queries(torch.arange(NUM_ITEMS)), items)
        for items in (range(9), range(9, NUM_ITEMS))
    ]
    got = torch.cat(parts, dim=1).numpy()
    cosines = _cosines(train)
    for row, all_of_row in zip(got, cosines, strict=True):
        is_kept = row > 0
        assert is_kept.sum() == min(3, (all_of_row > 0).sum())
        np.testing.assert_allclose(row[is_kept], all_of_row[is_kept], rtol=1e-6)
        # Which of equal cosines stays is open.
        assert all_of_row[~is_kept].max() <= all_of_row[is_kept].min(initial=2) + 1e-9


# --- best items and the model's scores ----------------------------------------------------------


def test_top_items_are_the_head_of_a_full_sort_without_the_seen(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(NUM_USERS, NUM_ITEMS, generator=generator)
    users = torch.tensor([3, 9, 30])
    seen = _jagged([[1, 2, 3], [], [16, 0]])
    ids, values = top_items(_Scores(scores), users, seen, 4, NUM_ITEMS, ranks)
    for row, (user, hidden) in enumerate(zip(users.tolist(), _rows(seen), strict=True)):
        order = sorted(
            set(range(NUM_ITEMS)) - set(hidden), key=lambda item, u=user: -float(scores[u, item])
        )
        assert ids[row].tolist() == order[:4]
        assert torch.equal(values[row], scores[user, order[:4]])
    unhidden, _ = top_items(_Scores(scores), users, None, NUM_ITEMS, NUM_ITEMS, ranks)
    assert torch.equal(unhidden, scores[users].argsort(dim=1, descending=True))


def test_top_items_of_equal_scores_come_by_dense_id_with_their_scores(ranks: Ranks) -> None:
    scores = torch.tensor([[-1.5, 2, -0.0, 0, 2, -torch.inf, -1.5]])
    ids, values = top_items(_Scores(scores), torch.tensor([0]), None, 7, 7, ranks)
    assert ids.tolist() == [[1, 4, 2, 3, 0, 6, 5]]
    assert torch.equal(values, scores.gather(1, ids))


def test_top_items_say_where_candidates_ran_out(ranks: Ranks) -> None:
    scores = torch.tensor([[1.0, 3, 2]])
    ids, values = top_items(_Scores(scores), torch.tensor([0]), _jagged([[0, 1]]), 10, 3, ranks)
    assert values.tolist() == [[2, -torch.inf, -torch.inf]]
    assert ids[0, 0] == 2


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_model_scores_each_user_by_the_newest_items_alone(
    ranks: Ranks, cycle: PreparedDataset, attention: str
) -> None:
    model = {"dim": 16, "num_layers": 1, "max_length": 5, "attention": attention}
    config = tiny_config(Path(), model=model)
    built = build_learner(config, TrainConfig(), [], cycle, ranks)
    backbone = built.learner.backbone.eval()
    weight = backbone.items.weight.detach()
    history = cycle.history("valid")
    users = torch.tensor([30, 1, 17])
    scorer = ModelScorer(backbone, history, ranks)
    got = scorer.scores(scorer.queries(users), range(cycle.num_items))
    num_read = 5 if attention == "causal" else 4
    cut = 0
    for row, user in enumerate(users.tolist()):
        items = torch.tensor(_rows(history)[user])
        newest = items[-num_read:]
        cut += len(newest) < len(items)
        tokens = Jagged(weight[newest], torch.tensor([0, len(newest)]))
        with torch.no_grad():
            expected = backbone.encode_users(torch.tensor([user]), tokens) @ weight.T
        torch.testing.assert_close(got[row], expected[0])
    assert cut  # at least one history was longer
