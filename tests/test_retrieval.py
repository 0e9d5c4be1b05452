"""Searches and choices among what they find, on random vectors."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt import scoring
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, join_ranks, joined_ranks
from torchrec_pt.diversity import choose_diverse
from torchrec_pt.explanations import shares_of_history
from torchrec_pt.models.ranking_head import MlpHead
from torchrec_pt.retrieval import GraphSearch, build_retrieval
from torchrec_pt.scoring import top_items

NUM_ITEMS, DIM, K = 3000, 16, 10


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as joined:
        yield joined


class _Products:
    """A scorer of vectors (N, D)."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def queries(self, users: Tensor) -> Tensor:
        raise AssertionError

    def scores(self, queries: Tensor, items: range) -> Tensor:
        return queries @ self.vectors[items.start : items.stop].T


class _Exact:
    def __init__(self, vectors: Tensor) -> None:
        self._scorer = _Products(vectors)

    def search(
        self, queries: Tensor, k: int, seen: Jagged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ranks = join_ranks()
        return top_items(self._scorer, queries, seen, k, NUM_ITEMS, ranks, allowed)


def _world() -> tuple[Tensor, Tensor, Jagged, Tensor]:
    """Vectors, queries, what each has seen, which items are allowed."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(NUM_ITEMS, DIM, generator=draw)
    queries = torch.randn(20, DIM, generator=draw)
    best = (queries @ vectors.T).topk(30, dim=1).indices
    seen = Jagged(best[:, ::3].flatten(), torch.arange(21) * 10)  # some of the best
    return vectors, queries, seen, torch.rand(NUM_ITEMS, generator=draw) < 0.5


def _brute(
    vectors: Tensor, queries: Tensor, seen: Jagged | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = queries @ vectors.T
    if seen is not None:
        scores[seen.rows, seen.values] = -torch.inf
    if allowed is not None:
        scores[:, ~allowed] = -torch.inf
    best = scores.topk(K, dim=1)
    return best.indices, best.values


@pytest.mark.parametrize("at_a_time", [1, 2**14, 2**18])
def test_the_exact_search_is_brute_force(
    monkeypatch: pytest.MonkeyPatch, ranks: Ranks, at_a_time: int
) -> None:
    monkeypatch.setattr(scoring, "SCORES_AT_A_TIME", at_a_time)
    vectors, queries, seen, allowed = _world()
    for hidden in (None, seen):
        for candidates in (None, allowed):
            ids, scores = top_items(
                _Products(vectors), queries, hidden, K, NUM_ITEMS, ranks, candidates
            )
            right, values = _brute(vectors, queries, hidden, candidates)
            assert torch.equal(ids, right)
            torch.testing.assert_close(scores, values)


def test_a_graph_finds_nearly_all_of_the_best_and_never_what_is_excluded() -> None:
    vectors, queries, seen, allowed = _world()
    graph = GraphSearch(vectors, _Exact(vectors))
    for hidden in (None, seen):
        for candidates in (None, allowed):
            ids, scores = graph.search(queries, K, hidden, candidates)
            right, _ = _brute(vectors, queries, hidden, candidates)
            pairs = zip(ids.tolist(), right.tolist(), strict=True)
            recall = np.mean([len(set(a) & set(b)) / K for a, b in pairs])
            assert recall > 0.9
            true = (queries @ vectors.T).gather(1, ids)
            torch.testing.assert_close(scores, true)
            if candidates is not None:
                assert candidates[ids].all()
            if hidden is not None:
                own = zip(ids.tolist(), hidden.values.view(20, -1).tolist(), strict=True)
                assert all(not set(a) & set(b) for a, b in own)


def test_few_candidates_are_searched_exactly_and_may_run_out() -> None:
    vectors, queries, _, _ = _world()
    graph = GraphSearch(vectors, _Exact(vectors))
    allowed = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    allowed[[5, 2999, 70]] = True
    ids, scores = graph.search(queries, K, None, allowed)
    assert torch.equal(ids[:, :3], _brute(vectors, queries, None, allowed)[0][:, :3])
    assert (scores[:, 3:] == -torch.inf).all()


def test_a_graph_is_refused_where_scores_are_no_inner_products(ranks: Ranks) -> None:
    head = MlpHead.__new__(MlpHead)
    scorer: Any = SimpleNamespace(head=head)
    with pytest.raises(ValueError, match='ranks by its mlp head; use "exact"'):
        build_retrieval("hnsw", scorer, ranks)


# --- choosing among what was found --------------------------------------------------------------


def _choose_one_by_one(scores: list[float], vectors: Tensor, k: int, weight: float) -> list[int]:
    """MMR as its paper has it, in plain Python."""
    unit = F.normalize(vectors.double(), dim=1)
    lowest, highest = min(scores), max(scores)
    relevance = [(score - lowest) / (highest - lowest) for score in scores]
    chosen: list[int] = []
    while len(chosen) < k:
        left = [place for place in range(len(scores)) if place not in chosen]

        def value(place: int) -> float:
            likeness = [float(unit[place] @ unit[other]) for other in chosen]
            return (1 - weight) * relevance[place] - weight * max(likeness, default=0.0)

        chosen.append(max(left, key=value))
    return chosen


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_diverse_choices_are_those_of_the_greedy_reference(weight: float) -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 40, generator=draw).sort(dim=1, descending=True).values
    vectors = torch.randn(5, 40, 8, generator=draw)
    found = choose_diverse(scores, vectors, 12, weight)
    for row in range(5):
        right = _choose_one_by_one(scores[row].tolist(), vectors[row], 12, weight)
        assert found[row].tolist() == right
    if weight == 0:
        assert found.tolist() == [list(range(12))] * 5


def test_choices_end_where_candidates_do() -> None:
    scores = torch.tensor([[3.0, 2.0, -torch.inf], [1.0, -torch.inf, -torch.inf]])
    vectors = torch.ones(2, 3, 4)
    for weight in (0.0, 0.5, 1.0):
        assert choose_diverse(scores, vectors, 3, weight).tolist() == [[0, 1, -1], [0, -1, -1]]


def test_shares_are_of_what_is_like_the_item_and_sum_to_one() -> None:
    history = torch.tensor([[2.0, 0], [0, 3], [-1, 0]])
    offered = torch.tensor([[1.0, 1], [5, 0], [-1, -1e-9]])
    shares = shares_of_history(offered, history)
    torch.testing.assert_close(
        shares, torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [0, 0, 1]]), atol=1e-6, rtol=0
    )
    assert shares_of_history(-offered[1:2], history[:1]).tolist() == [[0.0]]
