"""Fine-tuning for ranking: cuts and targets, negatives, both losses, and that they learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import RankingConfig, TransformerConfig
from torchrec_pt.data.batch import Embedded, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.tasks.ranking import RankingTask

NUM_ITEMS = 600


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _model(attention: str = "bidirectional") -> TransformerConfig:
    return TransformerConfig(dim=16, num_layers=1, max_length=5, dropout=0, attention=attention)


def _task(attention: str = "bidirectional", num_items: int = NUM_ITEMS, **o: Any) -> RankingTask:
    return RankingTask(RankingConfig(**o), _model(attention), num_items, seed=0)


@pytest.mark.parametrize(("attention", "num_read"), [("causal", 5), ("bidirectional", 4)])
def test_the_target_follows_the_history_and_every_cut_is_drawn(
    attention: str, num_read: int
) -> None:
    task = _task(attention, targets_per_user=2)
    cuts = []
    for step in range(100):
        draw = task.draw(rows_of([12, 1, 2, 0], step))
        history, target = draw.lookups["history"], draw.tensors["target"]
        assert draw.tensors["weight"].tolist() == [1, 0, 1, 0] * 2
        parts = history.values.split(history.lengths.tolist())
        for row in (0, 2, 4, 6):
            place = int(target[row]) % 100
            expected = range(int(target[row]) - min(place, num_read), int(target[row]))
            assert parts[row].tolist() == list(expected)
            assert int(target[row]) // 100 == row % 4
        assert history.lengths[[1, 3, 5, 7]].tolist() == [0] * 4
        cuts += target[[0, 4]].tolist()
    counts = torch.bincount(torch.tensor(cuts), minlength=12)
    assert counts[0] == 0  # the first item has no history
    assert counts[1:].min() >= 3  # 200 draws over 11 places, 18 each on average


def test_the_targets_of_a_user_are_drawn_apart() -> None:
    target = _task(targets_per_user=2).draw(rows_of([80] * 6)).tensors["target"]
    assert (target[:6] != target[6:]).sum() >= 5
    again = _task(targets_per_user=2).draw(rows_of([80] * 6, step=1)).tensors["target"]
    assert (target != again).sum() >= 10


def test_a_padding_row_weighs_nothing() -> None:
    rows = rows_of([4, 5])
    padded = dataclasses.replace(rows, weight=torch.tensor([1.0, 0.0]))
    assert _task().draw(padded).tensors["weight"].tolist() == [1, 0]


def test_negatives_are_items_that_the_user_never_took_in_training() -> None:
    rows = rows_of([12, 0, 2, 7])
    task = _task(loss="bpr", num_items=310, num_negatives=300, targets_per_user=2)
    negatives = task.draw(rows).lookups["negatives"].values.view(8, 300)
    taken = [set(part.tolist()) for part in rows.histories.values.split([12, 0, 2, 7])] * 2
    for row in range(8):
        assert not taken[row] & set(negatives[row].tolist())
    counts = torch.histc(negatives[[1, 5]].float(), 10, 0, 310)
    # Uniform: 9 degrees of freedom, so 45 is beyond one in 10^6.
    assert float(((counts - 60) ** 2 / 60).sum()) < 45
    assert len({tuple(row.tolist()) for row in negatives}) == 8


def _embedded(task: RankingTask, rows: Rows, table: torch.Tensor) -> Embedded:
    return embedded(task.draw(rows), table)


def test_softmax_is_the_weighted_cross_entropy_over_the_catalogue() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(NUM_ITEMS, 16), Transformer(_model(), NUM_ITEMS)
    task, rows = _task(targets_per_user=2, temperature=0.7), rows_of([12, 1, 2, 0])
    drawn = _embedded(task, rows, table)
    catalogue = Catalogue(table, 0, False)
    got = task.loss(backbone, drawn, rows, catalogue)
    user = backbone.encode_users(rows.users.repeat(2), drawn.vectors["history"])
    logits = user.double() @ table.double().T / 0.7
    each = F.cross_entropy(logits, drawn.tensors["target"], reduction="none")
    torch.testing.assert_close(
        got.total.double(), each[[0, 2, 4, 6]].sum(), rtol=1e-5, atol=0
    )  # float32
    assert got.weight == 4


def test_bpr_is_the_mean_over_negatives_written_out() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(300, 16), Transformer(_model(), 300)
    task = _task(loss="bpr", num_items=300, num_negatives=20, temperature=0.7)
    rows = rows_of([60, 1, 70])
    drawn = _embedded(task, rows, table)
    got = task.loss(backbone, drawn, rows, None)
    user = backbone.encode_users(rows.users, drawn.vectors["history"]).detach().double()
    negatives = drawn.vectors["negatives"].values.view(3, 20, 16).double()
    positive = drawn.vectors["target"].values.double()
    total = 0.0
    for row in (0, 2):  # a single item leaves nothing to predict
        for draw in range(20):
            margin = float(user[row] @ (positive[row] - negatives[row, draw])) / 0.7
            total += math.log(1 + math.exp(-margin)) / 20
    assert got.total.item() == pytest.approx(total, rel=1e-5)  # float32
    assert got.weight == 2


def test_bpr_gives_zero_where_the_user_took_the_whole_catalogue() -> None:
    table, backbone = torch.randn(4, 16), Transformer(_model(), 4)
    task, rows = _task(loss="bpr", num_items=4), rows_of([4])
    got = task.loss(backbone, _embedded(task, rows, table), rows, None)
    assert got.total == 0
    assert got.weight == 0


@pytest.mark.parametrize("loss", ["softmax", "bpr"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_it_lowers_its_own_loss(
    cycle: PreparedDataset,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    attention: str,
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 16)  # of four steps
    ranking = {"batch_size": 10, "learning_rate": 0.01, "warmup_steps": 0, "loss": loss}
    config = tiny_config(
        cycle.path,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "attention": attention},
        finetune={"ranking": {**ranking, "targets_per_user": 4}},
    )
    found = losses.train({"config": config.model_dump(mode="json")}, cycle, ranks)["losses"]
    means = torch.tensor(found).view(16, 4).mean(1)
    # Chance is log 30 = 3.4 and log 2 = 0.69; an epoch's mean moves by a few hundredths of it.
    assert means[-1] < 0.8 * means[0], means
