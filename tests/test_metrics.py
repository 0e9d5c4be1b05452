"""Metrics against torchmetrics, and intervals against their formulas and the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, mean_squared_error
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.metrics import (
    Estimate,
    click_metrics,
    mean_estimate,
    paired_difference,
    ranking_metrics,
    rating_metrics,
    sampled_ranking_metrics,
)

NUM_ITEMS, NUM_USERS = 40, 60


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
    found = [
        1 + scores_of.argsort(descending=True).argsort()[is_relevant.bool()]
        for scores_of, is_relevant in zip(scores, relevant, strict=True)
    ]
    lengths = torch.tensor([len(ranks) for ranks in found])
    return Jagged.from_lengths(torch.cat(found), lengths)


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


@pytest.mark.parametrize("k", [1, 3, 10, NUM_ITEMS])
def test_metrics_agree_with_torchmetrics(k: int) -> None:
    scores, relevant = _random_lists()
    got = ranking_metrics(_ranks(scores, relevant), (k,))
    for name, reference in {
        f"hr@{k}": lambda s, r: retrieval_hit_rate(s, r, top_k=k),
        f"recall@{k}": lambda s, r: retrieval_recall(s, r, top_k=k),
        f"ndcg@{k}": lambda s, r: retrieval_normalized_dcg(s, r, top_k=k),
        "mrr": retrieval_reciprocal_rank,
    }.items():
        expected = torch.stack([reference(s, r) for s, r in zip(scores, relevant, strict=True)])
        # torchmetrics computes in float32
        torch.testing.assert_close(got[name], expected.double(), rtol=1e-5, atol=1e-6)


def test_one_relevant_item_gives_the_textbook_values() -> None:
    ranks = Jagged(torch.tensor([1, 3, 11]), torch.arange(4))
    got = ranking_metrics(ranks, (3, 10))
    assert list(got) == ["hr@3", "recall@3", "ndcg@3", "hr@10", "recall@10", "ndcg@10", "mrr"]
    assert got["hr@3"].tolist() == got["recall@10"].tolist() == [1, 1, 0]
    assert got["ndcg@3"].tolist() == pytest.approx([1, 0.5, 0])
    assert got["mrr"].tolist() == pytest.approx([1, 1 / 3, 1 / 11])


def test_the_paired_interval_is_that_of_the_mean_difference() -> None:
    # Differences 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3.
    a, b = torch.tensor([1.0, 4, 3, 7]), torch.tensor([0.0, 2, 0, 1])
    first, second = mean_estimate(a), mean_estimate(b)
    mean, half_width = paired_difference(first, second)
    assert mean == 3
    assert half_width == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    assert paired_difference(second, first) == (-mean, pytest.approx(half_width))
    assert paired_difference(first, first) == (0, 0)


def test_the_paired_interval_agrees_with_a_bootstrap_over_users() -> None:
    draw = np.random.default_rng(0)
    ease = draw.random(400)  # users are easy or hard for both models
    a, b = ((ease + draw.random(400) > level).astype(float) for level in (0.9, 1.0))
    mean, half_width = paired_difference(
        mean_estimate(torch.from_numpy(a)), mean_estimate(torch.from_numpy(b))
    )
    means = (a - b)[draw.integers(400, size=(4000, 400))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    # A quantile of 4000 draws is off by about 4 %; 10 % leaves room for the normal approximation.
    assert mean - half_width == pytest.approx(low, abs=0.1 * half_width)
    assert mean + half_width == pytest.approx(high, abs=0.1 * half_width)


# --- clicks and ratings -------------------------------------------------------------------------


def _judged(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two models' predictions (with ties), labels, and users with one to nine rows each."""
    draw = np.random.default_rng(seed)
    users = np.repeat(np.arange(300), draw.integers(1, 10, 300))
    hard = draw.normal(0, 1, 300)[users]
    labels = hard + draw.normal(0, 1, len(users)) > 0
    a, b = (
        np.round(1 / (1 + np.exp(-(hard * gain + draw.normal(0, 1, len(users))))), 2)
        for gain in (1.0, 0.7)
    )
    return tuple(torch.from_numpy(x) for x in (a, b, labels.astype(float), users))


def test_click_metrics_agree_with_torchmetrics() -> None:
    a, _, labels, users = _judged()
    found = click_metrics(a, labels, users)
    expected = binary_auroc(a, labels.long())
    assert found["auc"].value == pytest.approx(float(expected), rel=1e-5)  # float32 there
    loss = torch.nn.functional.binary_cross_entropy(a.clamp(1e-7, 1 - 1e-7), labels)
    assert found["logloss"].value == pytest.approx(float(loss))


def test_rating_metrics_agree_with_torchmetrics() -> None:
    a, b, _, users = _judged()
    found = rating_metrics(a, b, users)
    assert found["rmse"].value == pytest.approx(float(mean_squared_error(a, b, squared=False)))
    assert found["mae"].value == pytest.approx(float(mean_absolute_error(a, b)))


@pytest.mark.parametrize("metric", ["auc", "logloss", "rmse", "mae"])
def test_the_paired_interval_of_any_metric_agrees_with_a_bootstrap_over_users(
    metric: str,
) -> None:
    a, b, labels, users = _judged()
    metrics = click_metrics if metric in ("auc", "logloss") else rating_metrics

    def found(predictions: Tensor, rows: Tensor) -> Estimate:
        _, user = users[rows].unique(return_inverse=True)
        return metrics(predictions[rows], labels[rows], user)[metric]

    rows = torch.arange(len(a))
    difference, half_width = paired_difference(found(a, rows), found(b, rows))
    assert difference == pytest.approx(found(a, rows).value - found(b, rows).value)
    starts = torch.searchsorted(users, torch.arange(301))
    draw = np.random.default_rng(1)
    drawn = []
    for _ in range(1000):
        chosen = draw.integers(0, 300, 300)
        again = torch.cat([rows[starts[user] : starts[user + 1]] for user in chosen])
        drawn.append(found(a, again).value - found(b, again).value)
    # The deviation of 1000 draws is off by about 2 %.
    assert half_width == pytest.approx(1.96 * float(np.std(drawn)), rel=0.1)


def test_influences_sum_to_nothing() -> None:
    a, b, labels, users = _judged()
    estimates = {**click_metrics(a, labels, users), **rating_metrics(a, b, users)}
    for name, estimate in estimates.items():
        assert len(estimate.influence) == 300, name
        assert float(estimate.influence.sum()) == pytest.approx(0, abs=1e-12), name


def test_the_auc_of_one_class_is_undefined_and_the_logloss_is_not() -> None:
    found = click_metrics(torch.tensor([0.5, 0.25]), torch.ones(2), torch.arange(2))
    assert math.isnan(found["auc"].value)
    assert found["logloss"].value == pytest.approx((math.log(2) + math.log(4)) / 2)
