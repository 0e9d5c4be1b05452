"""Losses of ratings against their formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.tasks.test_pairs import built, pair_config
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.tasks.rating import RatingTask


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


@pytest.mark.parametrize("loss", ["mse", "rmse", "huber"])
def test_a_loss_and_its_gradient_are_its_formula(cycle: PreparedDataset, loss: str) -> None:
    task, _ = built(pair_config("rating", loss=loss, huber_delta=0.7), cycle)
    assert isinstance(task, RatingTask)
    torch.manual_seed(0)
    labels = torch.randint(1, 6, (50,)).float()
    linked = (3 + torch.randn(50)).requires_grad_()
    mean = task.total_loss(linked, labels) / 50
    (got,) = torch.autograd.grad(mean, linked)
    error = linked - labels
    inside = error.abs() <= 0.7
    expected = {
        "mse": F.mse_loss(linked, labels),
        "rmse": F.mse_loss(linked, labels).sqrt(),
        "huber": torch.where(inside, error.square() / 2, 0.7 * (error.abs() - 0.35)).mean(),
    }[loss]
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, linked)[0])
    nothing = task.total_loss(linked[:0], labels[:0])
    assert float(nothing.detach()) == 0


def test_heads_that_do_not_divide_the_vectors_are_refused(cycle: PreparedDataset) -> None:
    with pytest.raises(ValueError, match=r"rating\.attention_heads: must divide model\.dim \(16\)"):
        built(pair_config("rating", attention_heads=3), cycle)
