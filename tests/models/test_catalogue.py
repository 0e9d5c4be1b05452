"""The catalogue's softmax and sums against torch over all scores, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.across_ranks import peak_bytes
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.models import catalogue
from torchrec_pt.models.catalogue import Catalogue

NUM_ITEMS, DIM = 23, 16
# With one rank that holds everything, the code of many ranks must give the same.
SHARDED = pytest.mark.parametrize("is_sharded", [False, True])


@pytest.fixture(autouse=True, scope="module")
def _joined() -> Iterator[None]:
    with joined_ranks():
        yield


def _inputs(num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    query = torch.randn(num_rows, DIM, generator=generator).requires_grad_()
    keys = torch.randn(NUM_ITEMS, DIM, generator=generator).requires_grad_()
    target = torch.randint(NUM_ITEMS, (num_rows,), generator=generator)
    weight = torch.rand(num_rows, generator=generator)
    weight[::3] = 0
    return query, keys, target, weight


def _full(
    query: Tensor, keys: Tensor, target: Tensor, weight: Tensor, temperature: Tensor
) -> Tensor:
    logits = query.double() @ keys.double().T / temperature.double()
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum()


@SHARDED
@pytest.mark.parametrize("num_rows", [1, 2, 40])
def test_loss_and_gradients_are_those_of_the_full_cross_entropy(
    is_sharded: bool, num_rows: int
) -> None:
    query, keys, target, weight = _inputs(num_rows)
    temperature = torch.tensor(0.7, requires_grad=True)
    leaves = (query, keys, temperature)
    got = Catalogue(keys, 0, is_sharded).softmax_loss(
        query, target, weight, temperature=temperature
    )
    expected = _full(query, keys, target, weight, temperature)
    # float32 sums of up to 40 rows
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@SHARDED
def test_a_float_temperature_is_as_good_as_a_tensor(is_sharded: bool) -> None:
    query, keys, target, weight = _inputs(9)
    catalogue = Catalogue(keys, 0, is_sharded)
    by_float = catalogue.softmax_loss(query, target, weight, temperature=0.5)
    by_tensor = catalogue.softmax_loss(query, target, weight, temperature=torch.tensor(0.5))
    assert by_float == by_tensor


@SHARDED
def test_no_rows_give_zero_and_zero_gradients(is_sharded: bool) -> None:
    query, keys, target, weight = _inputs(0)
    loss = Catalogue(keys, 0, is_sharded).softmax_loss(query, target, weight, temperature=1.0)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (query, keys)):
        assert (gradient == 0).all()


@SHARDED
def test_a_row_of_weight_zero_has_no_say(is_sharded: bool) -> None:
    query, keys, target, weight = _inputs(6)
    weight[:] = torch.tensor([1.0, 0, 2, 0, 0, 0])
    some = torch.tensor([0, 2])
    catalogue = Catalogue(keys, 0, is_sharded)
    loss = catalogue.softmax_loss(query, target, weight, temperature=1.0)
    expected = catalogue.softmax_loss(query[some], target[some], weight[some], temperature=1.0)
    torch.testing.assert_close(loss, expected)
    gradient, _ = torch.autograd.grad(loss, (query, keys))
    assert (gradient[weight == 0] == 0).all()


# --- sums over all scores of a row ----------------------------------------------------------------

SUMS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "logsumexp": (
        lambda catalogue, *rows: catalogue.sum_of_logsumexp(*rows, temperature=0.7),
        lambda scores: (scores / 0.7).logsumexp(1),
    ),
    "softplus": (Catalogue.sum_of_softplus, lambda scores: F.softplus(scores).sum(1)),
    "squares": (Catalogue.sum_of_squares, lambda scores: scores.square().sum(1)),
}


@SHARDED
@pytest.mark.parametrize("num_rows", [0, 1, 40])
@pytest.mark.parametrize("name", SUMS)
def test_sums_and_gradients_are_those_of_all_scores(
    is_sharded: bool, num_rows: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "SOFTPLUS_BLOCK", 10)  # the last of three is not whole
    query, keys, _, weight = _inputs(num_rows)
    summed, of_rows = SUMS[name]
    got = summed(Catalogue(keys, 0, is_sharded), query, weight)
    expected = (weight * of_rows(query.double() @ keys.double().T)).sum()
    # float32 sums of up to 40 rows
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    leaves = (query, keys)
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SUMS)
def test_sums_never_hold_a_score_of_every_pair(name: str) -> None:
    query = torch.randn(64, 4, requires_grad=True)
    keys = torch.randn(100_000, 4, requires_grad=True)

    def there_and_back() -> None:
        total = SUMS[name][0](Catalogue(keys, 0, False), query, torch.ones(64))
        torch.autograd.grad(total, (query, keys))

    assert peak_bytes(there_and_back) < 64 * 100_000 * 4 / 2
