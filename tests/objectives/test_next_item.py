"""Next item prediction: inputs and targets one step apart, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import NextItem, TransformerConfig, TwoTowerConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.next_item import NextItemObjective

MODEL = TransformerConfig(dim=16, num_layers=1, max_length=5, dropout=0, attention="causal")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _objective(temperature: float = 1.0) -> NextItemObjective:
    return NextItemObjective(NextItem(name="next_item", temperature=temperature), MODEL)


def test_every_item_but_the_first_is_the_target_of_the_one_before_it() -> None:
    draw = _objective().draw(rows_of([3, 0, 1, 12, 2]))
    history, target = draw.lookups["history"], draw.tensors["target"]
    assert history.lengths.tolist() == [2, 0, 0, 5, 1]
    assert torch.equal(target, history.values + 1)
    assert torch.equal(target // 100, history.rows)


def test_windows_reach_every_item_of_a_long_history_over_the_steps() -> None:
    targets = [_objective().draw(rows_of([12], step)).tensors["target"] for step in range(200)]
    counts = torch.bincount(torch.cat(targets), minlength=12)
    assert counts[0] == 0
    assert counts[1:].min() >= 5  # the rarest stand in 1 of 7 windows, 28 times on average
    assert len(counts) == 12


def test_loss_is_the_cross_entropy_of_all_next_items() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(500, 16), Transformer(MODEL, 500)
    objective, rows = _objective(0.7), rows_of([3, 0, 1, 12, 2])
    draw = objective.draw(rows)
    history = draw.lookups["history"]
    tokens = history.with_values(table[history.values])
    got = objective.loss(
        backbone,
        embedded(draw, table),
        rows,
        Catalogue(table, 0, False),
    )
    logits = backbone.encode_positions(tokens, None).double() @ table.double().T / 0.7
    expected = F.cross_entropy(logits, history.values + 1, reduction="sum")
    torch.testing.assert_close(got.total.double(), expected, rtol=1e-5, atol=0)  # float32
    assert got.weight == 8


def test_rows_with_nothing_to_predict_give_zero() -> None:
    table, backbone = torch.randn(500, 16), Transformer(MODEL, 500)
    objective, rows = _objective(), rows_of([1, 0])
    draw = objective.draw(rows)
    drawn = embedded(draw, table)
    got = objective.loss(backbone, drawn, rows, Catalogue(table, 0, False))
    assert got.total == 0
    assert got.weight == 0


def test_it_lowers_its_own_loss(
    cycle: PreparedDataset, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 10)  # of four steps
    config = tiny_config(
        cycle.path,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "attention": "causal"},
        pretrain={
            "batch_size": 10,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "objectives": [{"name": "next_item"}],
        },
    )
    found = losses.train({"config": config.model_dump(mode="json")}, cycle, ranks)["losses"]
    means = torch.tensor(found).view(10, 4).mean(1)
    # Chance is log 30 = 3.4; another order of the users moves an epoch's mean by about 0.1.
    assert means[-1] < means[0] - 0.5


def test_bidirectional_attention_is_refused_by_one_line() -> None:
    both = MODEL.model_copy(update={"attention": "bidirectional"})
    with pytest.raises(
        ValueError, match=r'next_item .* "bidirectional"; set it to "causal'
    ) as caught:
        NextItemObjective(NextItem(name="next_item"), both)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_positions_is_refused_by_one_line() -> None:
    towers = TwoTowerConfig(backbone="two_tower")
    with pytest.raises(ValueError, match="next_item needs a vector at every position") as caught:
        NextItemObjective(NextItem(name="next_item"), towers)
    assert "\n" not in str(caught.value)
