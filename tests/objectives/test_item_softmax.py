"""Softmax over sampled items: its loss written out, its draws, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.conftest import embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import NextItem, PredictionNegatives, TransformerConfig
from torchrec_pt.data.batch import Draw, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.item_softmax import SampledSoftmax
from torchrec_pt.objectives.next_item import NextItemObjective
from torchrec_pt.rng import RowNoise

MODEL = TransformerConfig(dim=16, num_layers=1, max_length=5, dropout=0, attention="causal")
COUNTS = torch.arange(600, 0, -1)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _softmax(name: str = "next_item", **options: Any) -> SampledSoftmax:
    config = PredictionNegatives(**{"num": 20, **options})
    return SampledSoftmax(config, COUNTS, seed=4, name=name, max_length=MODEL.max_length)


def _negatives(draw: Draw) -> torch.Tensor:
    """The items themselves."""
    return draw.lookups["items"].values[draw.tensors["negatives"]]


def _draw(softmax: SampledSoftmax, rows: Rows) -> Draw:
    return NextItemObjective(NextItem(name="next_item"), MODEL, softmax).draw(rows)


@pytest.mark.parametrize("shared", [False, True])
def test_loss_is_the_corrected_softmax_written_out(shared: bool) -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(600, 16), Transformer(MODEL, 600)
    softmax = _softmax(shared=shared)
    objective = NextItemObjective(NextItem(name="next_item", temperature=0.7), MODEL, softmax)
    assert not objective.needs_catalogue
    rows = rows_of([3, 0, 1, 12, 2])
    draw = objective.draw(rows)
    got = objective.loss(backbone, embedded(draw, table), rows, None)
    history = draw.lookups["history"]
    tokens = history.with_values(table[history.values])
    query = backbone.encode_positions(tokens, None).double()
    target, negatives = history.values + 1, _negatives(draw).expand(8, -1)
    logits = query @ table.double().T / 0.7
    expected = torch.tensor(0.0, dtype=torch.float64)
    for row in range(8):
        is_other = negatives[row] != target[row]
        log_q = draw.tensors["log_q"].expand(8, -1)[row, is_other]
        others = logits[row, negatives[row, is_other]] - log_q
        positive = logits[row, target[row]]
        expected = expected + torch.cat([positive[None], others]).logsumexp(0) - positive
    torch.testing.assert_close(got.total.double(), expected, rtol=1e-5, atol=0)  # float32
    assert got.weight == 8


def test_log_q_is_of_the_configured_distribution() -> None:
    log_q = _draw(_softmax(alpha=0.5), rows_of([4])).tensors["log_q"]
    negatives = _negatives(_draw(_softmax(alpha=0.5), rows_of([4])))
    weights = COUNTS.double() ** 0.5
    expected = (20 * weights / weights.sum()).log()[negatives]
    torch.testing.assert_close(log_q.double(), expected, rtol=1e-5, atol=0)


def test_each_item_is_looked_up_once() -> None:
    draw = _draw(_softmax(num=300), rows_of([6, 6]))
    items = draw.lookups["items"].values
    assert torch.equal(items, items.unique())
    assert _negatives(draw).shape == (10, 300)
    assert len(items) <= 600


def test_predictions_have_negatives_of_their_own_wherever_their_row_is() -> None:
    rows = rows_of([5, 3, 4])
    whole = _negatives(_draw(_softmax(), rows))
    assert len({tuple(row.tolist()) for row in whole}) == 4 + 2 + 3
    alone = Rows(
        users=torch.tensor([2]),
        histories=rows.histories.select(torch.tensor([2])),
        noise=RowNoise(0, 0, torch.tensor([2])),
        weight=torch.ones(1),
    )
    assert torch.equal(_negatives(_draw(_softmax(), alone)), whole[-3:])


@pytest.mark.parametrize("shared", [False, True])
def test_negatives_change_with_the_step_and_the_objective(shared: bool) -> None:
    def draw(name: str, step: int) -> torch.Tensor:
        return _negatives(_draw(_softmax(name, shared=shared), rows_of([4], step)))

    assert torch.equal(draw("next_item", 0), draw("next_item", 0))
    assert not torch.equal(draw("next_item", 0), draw("next_item", 1))
    assert not torch.equal(draw("next_item", 0), draw("masked_item", 0))


def test_an_item_without_interactions_may_be_a_negative() -> None:
    config = PredictionNegatives(num=50)
    softmax = SampledSoftmax(config, torch.zeros(3), seed=0, name="next_item", max_length=5)
    assert _negatives(_draw(softmax, rows_of([3]))).unique().tolist() == [0, 1, 2]


def test_more_shared_negatives_than_items_are_refused_by_one_line() -> None:
    with pytest.raises(ValueError, match="601 unique negatives are asked of the 600 items"):
        _softmax(num=601, shared=True)


@pytest.mark.parametrize("negatives", [{"num": 10}, {"num": 20, "shared": True}])
@pytest.mark.parametrize(
    ("objective", "attention", "gain"),
    [("next_item", "causal", 0.5), ("masked_item", "bidirectional", 0.2)],
)
def test_it_lowers_its_own_loss(
    cycle: PreparedDataset,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    attention: str,
    gain: float,
    negatives: dict[str, Any],
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 40)  # of four steps
    config = tiny_config(
        cycle.path,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0, "attention": attention},
        pretrain={
            "batch_size": 10,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "objectives": [{"name": objective, "negatives": negatives}],
        },
    )
    found = losses.train({"config": config.model_dump(mode="json")}, cycle, ranks)["losses"]
    means = torch.tensor(found).view(40, 4).mean(1)
    # Chance is about log 30 = 3.4; other draws move an epoch's mean by up to 0.1.
    assert means[-3:].mean() < means[:3].mean() - gain, means
