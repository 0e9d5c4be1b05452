"""Losses of lists against loops over items in float64, and against values known elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.tasks.ranking_losses import (
    approx_ndcg_loss,
    bpr_loss,
    hinge_loss,
    lambda_loss,
    listnet_loss,
    softmax_loss,
)

List = list[tuple[float, float, bool]]  # score, gain, whether it is one of the first K


def _pairs(items: List) -> list[tuple[float, float]]:
    return [(a, b) for (a, g, _), (b, h, _) in itertools.product(items, items) if g > h]


def _bpr(items: List) -> float:
    each = [math.log1p(math.exp(b - a)) for a, b in _pairs(items)]
    return sum(each) / len(each) if each else 0.0


def _hinge(items: List) -> float:
    each = [max(0.0, 0.4 - (a - b)) for a, b in _pairs(items)]
    return sum(each) / len(each) if each else 0.0


def _softmax(items: List) -> float:
    negatives = sum(math.exp(s) for s, _, is_first in items if not is_first)
    total = sum(g for _, g, _ in items)
    return sum(
        g / total * (math.log(math.exp(s) + negatives) - s) for s, g, is_first in items if g > 0
    )


def _listnet(items: List) -> float:
    if not any(g > 0 for _, g, _ in items):
        return 0.0
    wanted, given = (sum(math.exp(item[place]) for item in items) for place in (1, 0))
    return -sum(math.exp(g) / wanted * (s - math.log(given)) for s, g, _ in items)


def _best(items: List) -> float:
    ordered = sorted((g for _, g, _ in items), reverse=True)
    return sum(g / math.log2(2 + place) for place, g in enumerate(ordered))


def _lambda(items: List) -> float:
    rank = {}
    for place, index in enumerate(sorted(range(len(items)), key=lambda i: -items[i][0])):
        rank[index] = place + 1
    total = 0.0
    for i, j in itertools.permutations(range(len(items)), 2):
        (a, g, _), (b, h, _) = items[i], items[j]
        if g > h:
            moved = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
            total += (g - h) * moved / _best(items) * math.log1p(math.exp(b - a))
    return total


def _approx_ndcg(items: List) -> float:
    if not _best(items):
        return 0.0
    dcg = 0.0
    for i, (a, g, _) in enumerate(items):
        others = [b for j, (b, _, _) in enumerate(items) if j != i]
        rank = 1 + sum(1 / (1 + math.exp(a - b)) for b in others)
        dcg += g / math.log2(1 + rank)
    return 1 - dcg / _best(items)


def _uncorrected(scores: Tensor, gains: Tensor, mask: Tensor) -> Tensor:
    return softmax_loss(scores, gains, mask, torch.zeros_like(scores[:, gains.shape[1] :]))


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[List], float]]] = {
    "bpr": (bpr_loss, _bpr),
    "hinge": (lambda *args: hinge_loss(*args, margin=0.4), _hinge),
    "softmax": (_uncorrected, _softmax),
    "listnet": (listnet_loss, _listnet),
    "lambda": (lambda_loss, _lambda),
    "approx_ndcg": (approx_ndcg_loss, _approx_ndcg),
}


def _lists(num_first: int, length: int, grades: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Scores, gains 0 … grades and masks of 40 lists, some without items or relevant ones."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, length, generator=generator, dtype=torch.float64)
    gains = torch.randint(grades + 1, (40, num_first), generator=generator).double()
    mask = torch.rand(40, length, generator=generator) < 0.8
    gains[0], mask[1], mask[2, :num_first] = 0, False, False
    mask[3, num_first:] = False
    gains[3] = 1
    scores[4] = 0  # all alike
    return scores, gains, mask


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("num_first", "length"), [(1, 2), (1, 9), (3, 7), (6, 6), (2, 2)])
@pytest.mark.parametrize("grades", [1, 5])
def test_a_loss_is_its_formula_written_out(
    name: str, num_first: int, length: int, grades: int
) -> None:
    loss, reference = LOSSES[name]
    scores, gains, mask = _lists(num_first, length, grades)
    for row, got in enumerate(loss(scores, gains, mask).tolist()):
        items = [
            (float(scores[row, i]), float(gains[row, i]) if i < num_first else 0.0, i < num_first)
            for i in range(length)
            if mask[row, i]
        ]
        assert got == pytest.approx(reference(items), rel=1e-12, abs=1e-12), row


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_masked_or_irrelevant_gives_zero_and_no_gradient(name: str) -> None:
    scores, gains, mask = (x.clone() for x in _lists(3, 7, 1))
    scores[1] = 1e30
    scores = scores.float().requires_grad_()
    each = LOSSES[name][0](scores, gains.float(), mask)
    assert each[:3].tolist() == [0, 0, 0]  # no relevant item, no item, no relevant one by its mask
    each.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[:3].any()
    assert not scores.grad[~mask].any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_masked_place_holds_makes_no_difference(name: str) -> None:
    scores, gains, mask = _lists(3, 7, 5)
    other = torch.where(mask, scores, 77.0)
    of_gains = torch.where(mask[:, :3], gains, 9.0)
    loss = LOSSES[name][0]
    torch.testing.assert_close(loss(other, of_gains, mask), loss(scores, gains, mask))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    scores, gains, mask = _lists(2, 5, 3)
    scores[4] += torch.arange(5)  # ranks, and a hinge, change where scores are equal

    def loss(scores: Tensor) -> Any:
        return LOSSES[name][0](scores, gains, mask)

    assert torch.autograd.gradcheck(loss, scores.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_a_relevant_item_ahead_costs_less_than_one_far_behind(name: str) -> None:
    scores = torch.tensor([[1.0, 0, 0, 0], [-200.0, 0, 0, 0]])
    gains, mask = torch.ones(2, 1), torch.ones(2, 4, dtype=torch.bool)
    ahead, behind = LOSSES[name][0](scores, gains, mask).tolist()
    assert math.isfinite(behind)
    assert ahead < behind


def test_hinge_is_torchs_margin_ranking_loss() -> None:
    scores = torch.randn(8, 2, dtype=torch.float64)
    full = torch.ones(8, 2, dtype=torch.bool)
    expected = F.margin_ranking_loss(
        scores[:, 0], scores[:, 1], torch.ones(8), margin=0.7, reduction="none"
    )
    torch.testing.assert_close(hinge_loss(scores, torch.ones(8, 1), full, 0.7), expected)


def test_softmax_without_correction_is_torchs_cross_entropy() -> None:
    scores, full = torch.randn(8, 6, dtype=torch.float64), torch.ones(8, 6, dtype=torch.bool)
    expected = F.cross_entropy(scores, torch.zeros(8, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(_uncorrected(scores, torch.ones(8, 1), full), expected)


def test_softmax_corrected_by_log_q_estimates_the_sum_over_the_catalogue() -> None:
    """With every item but the target drawn 5 times for 5 expected, it is exact."""
    generator = torch.Generator().manual_seed(0)
    catalogue = torch.randn(9, generator=generator, dtype=torch.float64)
    scores = torch.cat([catalogue[:1], catalogue[1:].repeat(5)]).unsqueeze(0)
    log_q = torch.full((1, 40), math.log(5), dtype=torch.float64)
    full = torch.ones_like(scores, dtype=torch.bool)
    got = softmax_loss(scores, torch.ones(1, 1), full, log_q)
    expected = F.cross_entropy(catalogue.unsqueeze(0), torch.tensor([0]))
    torch.testing.assert_close(got, expected.unsqueeze(0))


def test_listnet_is_torchs_cross_entropy_of_soft_labels() -> None:
    scores, full = torch.randn(8, 6, dtype=torch.float64), torch.ones(8, 6, dtype=torch.bool)
    gains = torch.randint(1, 5, (8, 6)).double()
    expected = F.cross_entropy(scores, gains.softmax(1), reduction="none")
    torch.testing.assert_close(listnet_loss(scores, gains, full), expected)


def test_sharp_approx_ndcg_is_one_minus_ndcg() -> None:
    scores, gains, mask = _lists(5, 9, 4, seed=1)
    scores = scores.argsort(1).double()  # distinct
    got = 1 - approx_ndcg_loss(scores / 1e-3, gains, mask)
    for row in range(5, 40):
        order = scores[row].masked_fill(~mask[row], -1).argsort(descending=True)
        all_gains = F.pad(gains[row], (0, 4)).masked_fill(~mask[row], 0)
        discount = torch.arange(2, 11).log2()
        best = (all_gains.sort(descending=True).values / discount).sum()
        ndcg = (all_gains[order] / discount).sum() / best if best else torch.tensor(1.0)
        torch.testing.assert_close(got[row], ndcg.double())
