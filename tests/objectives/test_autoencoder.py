"""Reconstruction of histories: what is hidden, the losses written out, and that it learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tests.conftest import embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import Autoencoder as AutoencoderSettings
from torchrec_pt.config import AutoencoderConfig, ModelConfig, TransformerConfig, TwoTowerConfig
from torchrec_pt.data.batch import Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.autoencoder import Autoencoder
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.objectives.autoencoder import AutoencoderObjective

NUM_ITEMS = 500
MODEL: dict[str, Any] = {
    "backbone": "autoencoder",
    "dim": 16,
    "hidden_dims": (12,),
    "max_length": 8,
    "dropout": 0.0,
}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _model(**settings: Any) -> AutoencoderConfig:
    return AutoencoderConfig.model_validate({**MODEL, **settings})


def _settings(**settings: Any) -> AutoencoderSettings:
    return AutoencoderSettings.model_validate({"name": "autoencoder", **settings})


def _loss(objective: AutoencoderObjective, rows: Rows, **model: Any) -> tuple[Tensor, ...]:
    """The loss; what each row's scores and divergence were; which items were taken."""
    torch.manual_seed(0)
    backbone = Autoencoder(_model(**model), NUM_ITEMS)
    table = torch.randn(NUM_ITEMS, backbone.items.dim)
    draw = objective.draw(rows)
    drawn = embedded(draw, table)
    keys = backbone.encode_items(torch.arange(NUM_ITEMS), table)
    term = objective.loss(backbone, drawn, rows, Catalogue(keys, 0, False))
    history = drawn.vectors["history"]
    if "rating" in drawn.tensors:
        history = history.with_values(history.values * drawn.tensors["rating"].unsqueeze(1))
    user, divergence = backbone.encode_distributions(
        history, rows.noise, is_masked=drawn.tensors["is_hidden"]
    )
    x = torch.zeros(rows.num_rows, NUM_ITEMS, dtype=torch.float64)
    x[history.rows, draw.lookups["history"].values] = 1
    assert term.weight == rows.weight.sum()
    return term.total, user.double() @ keys.double().T, x, divergence


# --- drawing ------------------------------------------------------------------------------------


def test_a_part_of_the_items_is_hidden_by_row_and_step_alone(cycle: PreparedDataset) -> None:
    objective = AutoencoderObjective(_settings(corruption=0.3), _model(), cycle)
    rows = rows_of([8] * 500)
    draw = objective.draw(rows)
    hidden = draw.tensors["is_hidden"]
    assert abs(hidden.float().mean() - 0.3) < 0.03  # 4000 lots: a standard error of 0.007
    some = torch.tensor([7, 450])
    part = dataclasses.replace(
        rows,
        users=some,
        histories=rows.histories.select(some),
        noise=dataclasses.replace(rows.noise, rows=some),
        weight=torch.ones(2),
    )
    again = objective.draw(part)
    expected = draw.lookups["history"].with_values(hidden).select(some).values
    assert torch.equal(again.tensors["is_hidden"], expected)
    assert not torch.equal(objective.draw(rows_of([8] * 500, 1)).tensors["is_hidden"], hidden)


def test_an_item_that_was_taken_twice_is_there_once(cycle: PreparedDataset) -> None:
    objective = AutoencoderObjective(_settings(), _model(), cycle)
    rows = rows_of([4, 2])
    taken = Jagged(torch.tensor([5, 9, 5, 5, 9, 3]), torch.tensor([0, 4, 6]))
    history = objective.draw(dataclasses.replace(rows, histories=taken)).lookups["history"]
    assert history.values.tolist() == [5, 9, 3, 9]
    assert history.lengths.tolist() == [2, 2]


def test_ratings_are_those_of_the_drawn_items_in_deviations(cycle: PreparedDataset) -> None:
    objective = AutoencoderObjective(_settings(values="rating", loss="mse"), _model(), cycle)
    users = torch.tensor([4, 0, -1])
    known = rows_of([1, 1, 1])
    draw = objective.draw(dataclasses.replace(known, users=users))
    history = draw.lookups["history"]
    assert cycle.rating is not None
    seen = cycle.rating[cycle.split == 0]
    ratings = (draw.tensors["rating"] * seen.std(unbiased=False) + seen.mean()).round()
    rated = history.with_values(ratings)
    for place, user in enumerate((4, 0)):
        one = torch.tensor([user])
        is_train = cycle.interactions.with_values(cycle.split == 0).select(one).values
        items = cycle.interactions.select(one).values[is_train]
        given = cycle.interactions.with_values(cycle.rating).select(one).values[is_train]
        row = torch.tensor([place])
        got_items, got = history.select(row).values, rated.select(row).values
        begin = next(
            at
            for at in range(len(items))
            if torch.equal(items[at : at + len(got_items)], got_items)
        )
        assert torch.equal(given[begin : begin + len(got)], got)
    assert history.lengths[2] == 0


# --- losses -------------------------------------------------------------------------------------

ROWS = rows_of([3, 0, 1, 5, 2])


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)  # float32


def test_multinomial_is_the_cross_entropy_of_all_items(cycle: PreparedDataset) -> None:
    objective = AutoencoderObjective(_settings(temperature=0.7), _model(), cycle)
    got, scores, x, _ = _loss(objective, ROWS)
    _close(got, -(x * F.log_softmax(scores / 0.7, dim=1)).sum())


@pytest.mark.parametrize("positive_weight", [1.0, 20.0])
def test_mse_is_the_squared_error_over_the_whole_catalogue(
    cycle: PreparedDataset, positive_weight: float
) -> None:
    settings = _settings(loss="mse", positive_weight=positive_weight)
    got, scores, x, _ = _loss(AutoencoderObjective(settings, _model(), cycle), ROWS)
    weight = torch.where(x > 0, positive_weight, 1.0) * ROWS.weight.unsqueeze(1)
    _close(got, (weight * (scores - x).square()).sum())


def test_bce_is_the_cross_entropy_of_every_item_alone(cycle: PreparedDataset) -> None:
    got, scores, x, _ = _loss(AutoencoderObjective(_settings(loss="bce"), _model(), cycle), ROWS)
    each = F.binary_cross_entropy_with_logits(scores, x, reduction="none")
    _close(got, (each * ROWS.weight.unsqueeze(1)).sum())


def test_ratings_are_compared_where_there_are_some(cycle: PreparedDataset) -> None:
    objective = AutoencoderObjective(_settings(values="rating", loss="mse"), _model(), cycle)
    assert not objective.needs_catalogue
    rows = dataclasses.replace(rows_of([1] * 3), users=torch.tensor([4, 0, 9]))
    draw = objective.draw(rows)
    history, rating = draw.lookups["history"], draw.tensors["rating"]
    got, scores, _, _ = _loss(objective, rows)
    _close(got, (scores[history.rows, history.values] - rating).square().sum())


@pytest.mark.parametrize(
    ("settings", "step", "weight"),
    [
        *(({"kl_weight": 0.4, "anneal_steps": 10}, *at) for at in ((0, 0), (5, 0.2), (99, 0.4))),
        ({"kl_weight": 0.3}, 0, 0.3),
        ({}, 0, 0.2),
    ],
)
def test_the_divergence_is_annealed_if_asked(
    cycle: PreparedDataset, settings: dict[str, Any], step: int, weight: float
) -> None:
    objective = AutoencoderObjective(_settings(**settings), _model(variational=True), cycle)
    rows = rows_of([3, 0, 1, 5, 2], step)
    got, scores, x, divergence = _loss(objective, rows, variational=True)
    reconstruction = -(x * F.log_softmax(scores, dim=1)).sum()
    _close(got, reconstruction + weight * (divergence * rows.weight).sum().double())


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "model", "at_most"),
    [
        ({}, {}, 0.8),
        ({"kl_weight": 0.1, "anneal_steps": 20}, {"variational": True}, 0.88),
        ({"loss": "mse", "positive_weight": 10.0}, {"hidden_dims": ()}, 0.8),
        ({"loss": "bce"}, {}, 0.8),
        ({"values": "rating", "loss": "mse", "corruption": 0.2}, {}, 0.9),
    ],
    ids=["multinomial", "variational", "mse", "bce", "ratings"],
)
def test_it_lowers_its_own_loss(
    cycle: PreparedDataset,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    model: dict[str, Any],
    at_most: float,
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 30)  # of four steps
    config = tiny_config(
        cycle.path,
        model={**MODEL, **model},
        pretrain={
            "batch_size": 10,
            "learning_rate": 0.02,
            "warmup_steps": 0,
            "objectives": [{"name": "autoencoder", **settings}],
        },
    )
    found = losses.train({"config": config.model_dump(mode="json")}, cycle, ranks)["losses"]
    means = torch.tensor(found).view(30, 4).mean(1)
    assert means[-5:].mean() < at_most * means[0]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TransformerConfig(), TwoTowerConfig(backbone="two_tower")])
def test_another_backbone_is_refused_by_one_line(
    cycle: PreparedDataset, model: ModelConfig
) -> None:
    with pytest.raises(ValueError, match=f'model.backbone is "{model.backbone}"; set it') as caught:
        AutoencoderObjective(_settings(), model, cycle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"kl_weight": 0.1}, {"anneal_steps": 9}])
def test_a_divergence_without_a_variational_model_is_refused_by_one_line(
    cycle: PreparedDataset, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"model\.variational is false; set it to true") as caught:
        AutoencoderObjective(_settings(**settings), _model(), cycle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rating", "says"), [(None, "columns.rating is not set"), (4.0, "all of training are 4")]
)
def test_ratings_that_tell_nothing_are_refused_by_one_line(
    cycle: PreparedDataset, rating: float | None, says: str
) -> None:
    constant = None if rating is None else torch.full((len(cycle.split),), rating)
    data = dataclasses.replace(cycle, rating=constant)
    with pytest.raises(ValueError, match=says) as caught:
        AutoencoderObjective(_settings(values="rating", loss="mse"), _model(), data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"values": "rating"}, 'ratings have no multinomial loss; set loss to "mse"'),
        ({"loss": "bce", "temperature": 0.5}, "the bce loss has no temperature"),
        ({"positive_weight": 2.0}, "positive_weight is for mse of binary values"),
        (
            {"values": "rating", "loss": "mse", "positive_weight": 2.0},
            "positive_weight is for mse of binary values",
        ),
    ],
)
def test_settings_that_a_loss_does_not_read_are_refused(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        _settings(**settings)
