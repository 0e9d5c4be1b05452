"""Binary cross-entropy of sampled items: its loss written out, its gradients, that it learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tests.conftest import embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import NextItem, PredictionNegatives, TransformerConfig
from torchrec_pt.data.batch import Draw, Embedded
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives import item_bce
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.objectives.item_bce import SampledBce, own_scores
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.objectives.next_item import NextItemObjective

MODEL = TransformerConfig(dim=16, num_layers=1, max_length=5, dropout=0, attention="causal")
NUM_ITEMS, NUM = 400, 20
UNIFORM = {"num": NUM, "distribution": "uniform"}
COUNTS = torch.ones(NUM_ITEMS, dtype=torch.int64)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _loss_of(calibration: float, **options: Any) -> SampledBce:
    return SampledBce(
        PredictionNegatives(**{**UNIFORM, **options}),
        COUNTS,
        calibration=calibration,
        seed=4,
        name="next_item",
        max_length=MODEL.max_length,
    )


def _drawn(bce: SampledBce) -> tuple[Draw, int]:
    """What a step draws, with accidental hits, and the number of its predictions."""
    rows = rows_of([3, 0, 1, 4])
    draw = NextItemObjective(NextItem(name="next_item"), MODEL, bce).draw(rows)
    positive, negatives = draw.tensors["positive"], draw.tensors["negatives"]
    negatives[..., 3] = positive[1]
    negatives[..., 5] = positive[1]
    return draw, len(positive)


def _loss(bce: SampledBce, draw: Draw, query: Tensor, table: Tensor) -> LossTerm:
    """At temperature 0.7, of queries that are given."""
    backbone = Transformer(MODEL, NUM_ITEMS)
    drawn: Embedded = embedded(draw, table)
    return bce.loss(query, backbone, drawn, None, 0.7)


def _written_out(draw: Draw, query: Tensor, table: Tensor, beta: float) -> Tensor:
    """Of float64 inputs."""
    items = table[draw.lookups["items"].values]
    total = query.new_zeros(())
    every = draw.tensors["negatives"].expand(len(query), -1)
    for q, positive, negatives in zip(query, draw.tensors["positive"], every, strict=True):
        others = negatives[negatives != positive]
        right = torch.sigmoid(q @ items[positive] / 0.7) ** beta
        wrong = 1 - torch.sigmoid(items[others] @ q / 0.7)
        total = total - (right.log() + wrong.log().sum()) / (1 + NUM)
    return total


def _beta(t: float) -> float:
    alpha = NUM / (NUM_ITEMS - 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_loss_and_gradients_are_the_formula_written_out(shared: bool, calibration: float) -> None:
    torch.manual_seed(0)
    bce = _loss_of(calibration, shared=shared)
    draw, num = _drawn(bce)
    query, table = torch.randn(num, 16), torch.randn(NUM_ITEMS, 16)
    inputs = [query.requires_grad_(), table.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got = _loss(bce, draw, *inputs)
    expected = _written_out(draw, wide[0], wide[1], _beta(calibration))
    torch.testing.assert_close(got.total.double(), expected, rtol=1e-5, atol=0)  # float32
    assert got.weight == num
    got.total.backward()
    expected.backward()
    for one, reference in zip(inputs, wide, strict=True):
        assert one.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(one.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


def test_gbce_without_calibration_is_bce(cycle: PreparedDataset) -> None:
    torch.manual_seed(0)
    found = []
    for options in ({"loss": "bce"}, {"loss": "gbce", "calibration": 0.0}, {"loss": "gbce"}):
        one = {"name": "next_item", "negatives": UNIFORM, **options}
        config = tiny_config(
            cycle.path,
            model={"dim": 16, "num_layers": 1, "max_length": 8, "attention": "causal"},
            pretrain={"objectives": [one]},
        )
        (objective,) = build_objectives(config, cycle)
        assert isinstance(objective, NextItemObjective)
        assert not objective.needs_catalogue
        bce = objective.item_loss
        assert isinstance(bce, SampledBce)
        draw = objective.draw(rows_of([9]))
        query = torch.linspace(-1, 1, 16).repeat(len(draw.tensors["positive"]), 1)
        table = torch.linspace(-1, 1, cycle.num_items)[:, None].repeat(1, 16)
        found.append(_loss(bce, draw, query, table).total)
    assert found[0] == found[1]
    assert found[2] < found[0]


def test_more_negatives_of_a_small_catalogue_calibrate_less() -> None:
    assert _loss_of(1.0, num=399).beta == 1
    assert _loss_of(1.0, num=1).beta == pytest.approx(1 / 399)
    assert _loss_of(0.5, num=1).beta == pytest.approx((1 + 1 / 399) / 2)


@pytest.mark.parametrize("shared", [False, True])
def test_a_negative_that_is_the_right_item_counts_nothing(shared: bool) -> None:
    torch.manual_seed(0)
    bce = _loss_of(0.0, shared=shared)
    draw, num = _drawn(bce)
    draw.tensors["positive"][:] = 2
    draw.tensors["negatives"][:] = 2
    query, table = torch.randn(num, 16), torch.randn(NUM_ITEMS, 16)
    right = query @ table[draw.lookups["items"].values[2]] / 0.7
    expected = F.softplus(-right).sum() / (1 + NUM)
    torch.testing.assert_close(_loss(bce, draw, query, table).total, expected)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_scores_beyond_the_range_of_the_sigmoid_keep_loss_and_gradient(sign: float) -> None:
    bce = _loss_of(0.75)
    draw, num = _drawn(bce)
    query = torch.full((num, 16), 10.0 * sign, requires_grad=True)
    got = _loss(bce, draw, query, torch.ones(NUM_ITEMS, 16)).total
    score = 160 * sign / 0.7
    is_hit = draw.tensors["negatives"] == draw.tensors["positive"][:, None]
    wrong = (~is_hit).sum() * max(score, 0)
    expected = (num * bce.beta * max(-score, 0) + wrong) / (1 + NUM)
    assert got.item() == pytest.approx(float(expected), rel=1e-5)
    got.backward()
    assert query.grad is not None
    assert bool((query.grad != 0).all())


def test_scores_and_gradients_of_own_items_are_those_of_gathered_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (5, 3))
    query = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)  # two are not asked for
    whole = own_scores(query, items, ids)
    torch.testing.assert_close(whole, torch.einsum("bd,bmd->bm", query, items[ids]))
    monkeypatch.setattr(item_bce, "BLOCK", 2 * 3 * 4)  # two rows at once, and one
    assert torch.equal(own_scores(query, items, ids), whole)
    assert torch.autograd.gradcheck(lambda q, i: own_scores(q, i, ids), (query, items))
    none = own_scores(query[:0], items, ids[:0])
    assert none.shape == (0, 3)
    none.sum().backward()


def test_more_negatives_than_other_items_have_nothing_to_calibrate_for() -> None:
    assert _loss_of(0.0, num=400).beta == 1
    with pytest.raises(ValueError, match=r"num is 400, and there are 399 other items; low") as got:
        _loss_of(0.75, num=400)
    assert "\n" not in str(got.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"loss": "bce"}, "bce sets the right item against sampled ones, and negatives is not"),
        ({"loss": "gbce", "negatives": {"num": 3}}, "say negatives.distribution: .uniform"),
        ({"loss": "bce", "negatives": UNIFORM, "calibration": 0.5}, 'loss is "bce"; set loss to'),
        ({"calibration": 0.5}, 'calibration is that of gbce, and loss is "softmax"'),
        ({"loss": "gbce", "negatives": UNIFORM, "calibration": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_loss_that_lacks_what_it_needs_is_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        NextItem(name="next_item", **options)


def test_a_configuration_of_gbce_is_read_again_from_its_own_text() -> None:
    config = NextItem.model_validate({"name": "next_item", "loss": "gbce", "negatives": UNIFORM})
    assert NextItem.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("loss", "shared", "num_epochs"), [("bce", False, 24), ("bce", True, 24), ("gbce", False, 64)]
)
def test_it_lowers_its_own_loss_below_that_of_equal_scores(
    cycle: PreparedDataset,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    shared: bool,
    num_epochs: int,
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", num_epochs)  # of four steps
    negatives = {"num": 10, "distribution": "uniform", "shared": shared}
    config = tiny_config(
        cycle.path,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0, "attention": "causal"},
        pretrain={
            "batch_size": 10,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "schedule": "constant",  # the helper's others end after 100 steps
            "objectives": [{"name": "next_item", "loss": loss, "negatives": negatives}],
        },
    )
    found = losses.train({"config": config.model_dump(mode="json")}, cycle, ranks)["losses"]
    reached = torch.tensor(found)[-12:].mean()
    # One score for all items: σ = β / (β + 10) is its best; the first epochs find it.
    beta = 1.0 if loss == "bce" else 1 - 0.75 * (1 - 10 / (cycle.num_items - 1))
    share = beta / (beta + 10)
    equal = -(beta * math.log(share) + 10 * math.log(1 - share)) / 11
    assert reached < 0.8 * equal, (reached, equal)
