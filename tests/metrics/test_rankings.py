"""Metrics of rankings against torchmetrics, scikit-learn and ranx."""

from __future__ import annotations

import math

import numpy as np
import pytest
import ranx
import torch
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_precision,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.metrics import novelty, offered, ranking_metrics, sampled_ranking_metrics

NUM_ITEMS, NUM_USERS = 40, 60
NAMES = ("hr", "recall", "ndcg", "precision", "map")
IN_RANX = {"hr": "hit_rate"}
KS = (1, 3, 10, NUM_ITEMS, NUM_ITEMS + 5)


def _random_lists() -> tuple[list[Tensor], list[Tensor]]:
    """Scores without ties, and which items are relevant: from one to almost all."""
    generator = torch.Generator().manual_seed(0)
    scores, relevant = [], []
    for user in range(NUM_USERS):
        scores.append(torch.randperm(NUM_ITEMS, generator=generator).float())
        chosen = torch.randperm(NUM_ITEMS, generator=generator)[: 1 + user % (NUM_ITEMS - 1)]
        relevant.append(torch.zeros(NUM_ITEMS, dtype=torch.int64).index_fill(0, chosen, 1))
    return scores, relevant


def _ranks(scores: list[Tensor], relevant: list[Tensor]) -> Jagged:
    """In no order within a user."""
    found = [
        1 + scores_of.argsort(descending=True).argsort()[is_relevant.bool()]
        for scores_of, is_relevant in zip(scores, relevant, strict=True)
    ]
    lengths = torch.tensor([len(ranks) for ranks in found])
    return Jagged.from_lengths(torch.cat(found), lengths)


@pytest.mark.parametrize("k", [1, 3, 10, NUM_ITEMS])
def test_ranking_metrics_agree_with_torchmetrics(k: int) -> None:
    scores, relevant = _random_lists()
    got = ranking_metrics(_ranks(scores, relevant), (k,))
    for name, reference in {
        f"hr@{k}": lambda s, r: retrieval_hit_rate(s, r, top_k=k),
        f"recall@{k}": lambda s, r: retrieval_recall(s, r, top_k=k),
        f"ndcg@{k}": lambda s, r: retrieval_normalized_dcg(s, r, top_k=k),
        f"precision@{k}": lambda s, r: retrieval_precision(s, r, top_k=k),
        "mrr": retrieval_reciprocal_rank,
    }.items():
        expected = torch.stack([reference(s, r) for s, r in zip(scores, relevant, strict=True)])
        # torchmetrics computes in float32
        torch.testing.assert_close(got[name], expected.double(), rtol=1e-5, atol=1e-6)


def test_ranking_metrics_agree_with_scikit_learn() -> None:
    scores, relevant = _random_lists()
    got = ranking_metrics(_ranks(scores, relevant), KS)
    truth, predicted = (torch.stack(each).numpy() for each in (relevant, scores))
    for k in KS:
        expected = [ndcg_score(truth[[u]], predicted[[u]], k=k) for u in range(NUM_USERS)]
        np.testing.assert_allclose(got[f"ndcg@{k}"].numpy(), expected, rtol=1e-12)
    # Over the whole list all relevant items are found, and both divide by their number.
    expected = [average_precision_score(truth[u], predicted[u]) for u in range(NUM_USERS)]
    for k in (NUM_ITEMS, NUM_ITEMS + 5):
        np.testing.assert_allclose(got[f"map@{k}"].numpy(), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:unsafe cast from uint64")  # of numba within ranx
def test_ranking_metrics_agree_with_ranx() -> None:
    scores, relevant = _random_lists()
    found = _ranks(scores, relevant)
    items = [str(item) for item in range(NUM_ITEMS)]
    users = [f"{user:02}" for user in range(NUM_USERS)]  # ranx orders them as words
    truth = [{items[item]: 1 for item in r.nonzero().flatten()} for r in relevant]
    lists = [dict(zip(items, s.tolist(), strict=True)) for s in scores]
    of_ranx = {f"{name}@{k}": f"{IN_RANX.get(name, name)}@{k}" for k in KS for name in NAMES}
    expected = ranx.evaluate(
        ranx.Qrels(dict(zip(users, truth, strict=True))),
        ranx.Run(dict(zip(users, lists, strict=True))),
        [*of_ranx.values(), "mrr"],
        return_mean=False,
    )
    for name, values in ranking_metrics(found, KS).items():
        if name.startswith("map"):  # ranx divides by all relevant items, also where k has no room
            values = values * found.lengths.clamp(max=int(name[4:])) / found.lengths
        theirs = expected[of_ranx.get(name, name)]
        np.testing.assert_allclose(values.numpy(), theirs, rtol=1e-12, err_msg=name)


def test_one_relevant_item_gives_the_textbook_values() -> None:
    ranks = Jagged(torch.tensor([1, 3, 11]), torch.arange(4))
    got = ranking_metrics(ranks, (3, 10))
    assert list(got) == [*(f"{name}@{k}" for k in (3, 10) for name in NAMES), "mrr"]
    assert got["hr@3"].tolist() == got["recall@10"].tolist() == [1, 1, 0]
    assert got["ndcg@3"].tolist() == pytest.approx([1, 0.5, 0])
    assert got["precision@10"].tolist() == pytest.approx([0.1, 0.1, 0])
    assert got["map@3"].tolist() == got["map@10"].tolist() == pytest.approx([1, 1 / 3, 0])
    assert got["mrr"].tolist() == pytest.approx([1, 1 / 3, 1 / 11])


def test_a_list_of_relevant_items_alone_is_perfect_however_many_k_leaves_out() -> None:
    ranks = Jagged(torch.tensor([5, 1, 3, 2, 4]), torch.tensor([0, 5]))
    got = ranking_metrics(ranks, (2,))
    assert all(got[f"{name}@2"].tolist() == [1] for name in ("hr", "ndcg", "precision", "map"))
    assert got["recall@2"].tolist() == pytest.approx([2 / 5])


def test_sampled_metrics_are_means_over_lists_of_one_relevant_item_each() -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, 101, num).tolist() for num in draw.integers(1, 6, NUM_USERS)]
    ranks = Jagged.from_lengths(
        torch.tensor([rank for row in rows for rank in row]), torch.tensor([len(r) for r in rows])
    )
    got = sampled_ranking_metrics(ranks, (1, 10))
    assert list(got) == ["hr@1", "ndcg@1", "hr@10", "ndcg@10", "mrr"]
    expected = {
        "hr@1": [np.mean([rank == 1 for rank in row]) for row in rows],
        "hr@10": [np.mean([rank <= 10 for rank in row]) for row in rows],
        "ndcg@10": [np.mean([(r <= 10) / math.log2(r + 1) for r in row]) for row in rows],
        "mrr": [np.mean([1 / rank for rank in row]) for row in rows],
    }
    for name, values in expected.items():
        # Sums of a few doubles, in another order.
        np.testing.assert_allclose(got[name].numpy(), values, rtol=1e-12)
    assert torch.equal(got["hr@1"], got["ndcg@1"])


# --- what is offered ----------------------------------------------------------------------------


def test_novelty_is_the_mean_information_of_an_items_share_of_the_interactions() -> None:
    counts = torch.tensor([8, 4, 4, 0])  # of 16: 1, 2, 2 bits, and 4 as if it had one
    lists = Jagged.from_lengths(torch.tensor([0, 1, 3, 3]), torch.tensor([3, 1]))
    got = novelty(lists, counts, (1, 2, 9))
    assert list(got) == ["novelty@1", "novelty@2", "novelty@9"]
    assert got["novelty@1"].tolist() == [1, 4]
    assert got["novelty@2"].tolist() == [1.5, 4]
    assert got["novelty@9"].tolist() == pytest.approx([7 / 3, 4])


def test_an_item_is_offered_if_it_is_among_the_first_k_of_anyone() -> None:
    lists = Jagged.from_lengths(torch.tensor([0, 1, 3, 3]), torch.tensor([3, 1]))
    assert offered(lists, 5, 1).tolist() == [True, False, False, True, False]
    assert offered(lists, 5, 2).tolist() == [True, True, False, True, False]
    assert offered(lists, 5, 9).tolist() == [True, True, False, True, False]
