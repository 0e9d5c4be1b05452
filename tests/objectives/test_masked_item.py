"""Masked item prediction: what it hides, what it asks, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import MaskedItem, TransformerConfig, TwoTowerConfig
from torchrec_pt.data.batch import Draw, Embedded, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.masked_item import MaskedItemObjective
from torchrec_pt.rng import RowNoise

MODEL = TransformerConfig(dim=16, num_layers=1, max_length=5, dropout=0, attention="bidirectional")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _draw(rows: Rows, mask_fraction: float = 0.2, max_length: int = 5) -> Draw:
    config = MaskedItem(name="masked_item", mask_fraction=mask_fraction)
    model = MODEL.model_copy(update={"max_length": max_length})
    return MaskedItemObjective(config, model).draw(rows)


@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_items_are_hidden_at_the_configured_rate(fraction: float) -> None:
    # 100 items a row: that a row has none by chance, and gets one, adds less than 1e-6.
    masked = _draw(rows_of([100] * 200), fraction, max_length=100).tensors["is_masked"]
    deviation = (fraction * (1 - fraction) / 20_000) ** 0.5
    assert abs(float(masked.float().mean()) - fraction) < 5 * deviation
    by_place = masked.view(200, 100).float().mean(0)
    assert abs(by_place - fraction).max() < 6 * (fraction * (1 - fraction) / 200) ** 0.5


def test_every_row_that_has_an_item_hides_at_least_one_and_an_empty_row_none() -> None:
    rows = rows_of([1, 2, 0, 3, 5] * 20)
    masked = _draw(rows, mask_fraction=0.001).tensors["is_masked"]
    counts = torch.bincount(rows.histories.rows[masked], minlength=100)
    assert torch.equal(counts, (rows.histories.lengths > 0).long())


def test_the_target_is_the_hidden_item() -> None:
    draw = _draw(rows_of([4, 0, 9, 1]))
    history = draw.lookups["history"]
    assert torch.equal(draw.tensors["target"], history.values[draw.tensors["is_masked"]])
    assert torch.equal(history.values // 100, history.rows)


def test_windows_cover_a_long_history_over_the_steps_and_are_unbroken() -> None:
    starts = []
    for step in range(200):
        window = _draw(rows_of([12, 3], step)).lookups["history"]
        assert window.lengths.tolist() == [5, 3]
        first, short = window.values.split([5, 3])
        assert torch.equal(first, first[0] + torch.arange(5))
        assert torch.equal(short, 100 + torch.arange(3))
        starts.append(int(first[0]))
    # Eight starts, each drawn 25 times on average; fewer than 6 is one in 10^6.
    assert torch.bincount(torch.tensor(starts), minlength=8).min() >= 6
    assert max(starts) == 12 - 5


def test_masks_change_with_the_step_and_stay_with_the_row() -> None:
    first, again, later = (
        _draw(rows_of([5] * 30, step)).tensors["is_masked"] for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    rows = rows_of([5] * 30)
    order = torch.tensor([7, 3])
    some = Rows(order, RowNoise(0, 0, order), rows.weight[order], rows.histories.select(order))
    assert torch.equal(_draw(some).tensors["is_masked"].view(2, 5), first.view(30, 5)[order])


def test_loss_is_the_cross_entropy_at_the_hidden_places() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(500, 16), Transformer(MODEL, 500)
    config = MaskedItem(name="masked_item", temperature=0.7)
    objective = MaskedItemObjective(config, MODEL)
    rows = rows_of([4, 0, 9, 1, 2])
    draw = objective.draw(rows)
    history = draw.lookups["history"]
    tokens = history.with_values(table[history.values])
    got = objective.loss(
        backbone,
        embedded(draw, table),
        rows,
        Catalogue(table, 0, False),
    )
    is_masked = draw.tensors["is_masked"]
    encoded = backbone.encode_positions(tokens, None, is_masked=is_masked)
    logits = encoded[is_masked].double() @ table.double().T / 0.7
    expected = F.cross_entropy(logits, history.values[is_masked], reduction="sum")
    torch.testing.assert_close(got.total.double(), expected, rtol=1e-5, atol=0)  # float32
    assert got.weight == is_masked.sum()


def test_a_hidden_item_does_not_reach_the_loss() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(500, 16), Transformer(MODEL, 500)
    objective = MaskedItemObjective(MaskedItem(name="masked_item"), MODEL)
    rows = rows_of([4, 5])
    draw = objective.draw(rows)
    history = draw.lookups["history"]
    vectors = table[history.values].requires_grad_()
    places = history.with_values(torch.arange(len(vectors)))  # a row for each token
    drawn = Embedded(draw.lookups, vectors, {"history": places}, draw.tensors)
    catalogue = Catalogue(table, 0, False)
    objective.loss(backbone, drawn, rows, catalogue).total.backward()
    assert vectors.grad is not None
    reached = (vectors.grad != 0).any(1)
    assert torch.equal(reached, ~draw.tensors["is_masked"])


def test_it_lowers_its_own_loss(
    cycle: PreparedDataset, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 20)  # of four steps
    config = tiny_config(
        cycle.path,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0},
        pretrain={
            "batch_size": 10,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "objectives": [{"name": "masked_item", "mask_fraction": 0.3}],
        },
    )
    found = losses.train({"config": config.model_dump(mode="json")}, cycle, ranks)["losses"]
    means = torch.tensor(found).view(20, 4).mean(1)
    # From chance, log 30 = 3.4, to about 3.0; other masks move an epoch's mean by about 0.05.
    assert means[-3:].mean() < means[:3].mean() - 0.2, means


def test_causal_attention_is_refused_by_one_line() -> None:
    causal = MODEL.model_copy(update={"attention": "causal"})
    with pytest.raises(ValueError, match=r'masked_item .* "causal"; set it to "bidir') as caught:
        MaskedItemObjective(MaskedItem(name="masked_item"), causal)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_positions_is_refused_by_one_line() -> None:
    towers = TwoTowerConfig(backbone="two_tower")
    with pytest.raises(ValueError, match="masked_item needs a vector at every position") as caught:
        MaskedItemObjective(MaskedItem(name="masked_item"), towers)
    assert "\n" not in str(caught.value)
