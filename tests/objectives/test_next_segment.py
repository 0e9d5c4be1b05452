"""Next segment prediction: where it cuts, which other segment it sets, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import FEATURES, embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import NextSegment, TransformerConfig
from torchrec_pt.data.batch import Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.next_segment import NextSegmentObjective, other_rows
from torchrec_pt.rng import RowNoise

MODEL = TransformerConfig(dim=16, num_layers=1, max_length=5, dropout=0, attention="causal")
NO_ROW = torch.iinfo(torch.int64).max


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _objective() -> NextSegmentObjective:
    torch.manual_seed(0)
    objective = NextSegmentObjective(NextSegment(name="next_segment"), MODEL)
    torch.nn.init.normal_(objective.bilinear)
    torch.nn.init.constant_(objective.bias, 0.3)
    return objective


def _parts(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """Items of A and B of each row."""
    segments = _objective().draw(rows).lookups["segments"]
    parts = [part.tolist() for part in segments.values.split(segments.lengths.tolist())]
    return list(zip(parts[: rows.num_rows], parts[rows.num_rows :], strict=True))


# --- drawing ------------------------------------------------------------------------------------


def test_b_follows_a_without_a_gap_and_both_can_be_read() -> None:
    for step in range(100):
        for row, (a, b) in enumerate(_parts(rows_of([30, 2, 7, 10], step))):
            assert 1 <= len(a) <= 5
            assert 1 <= len(b) <= 5
            assert a + b == list(range(a[0], a[0] + len(a) + len(b)))
            assert a[0] // 100 == row


def test_every_place_of_a_history_is_cut_equally_often() -> None:
    cuts = [len(_parts(rows_of([7], step))[0][0]) for step in range(400)]
    counts = torch.bincount(torch.tensor(cuts), minlength=6)
    # A of 2 … 5 items leaves B at most five: 100 each, with a deviation of 8.7.
    assert counts[:2].sum() == 0
    assert (counts[2:] - 100).abs().max() < 45


def test_windows_come_from_anywhere_in_a_long_history() -> None:
    begins = {_parts(rows_of([14], step))[0][0][0] for step in range(100)}
    assert begins == set(range(5))


def test_a_history_of_fewer_than_two_items_has_no_parts_and_no_weight() -> None:
    rows = rows_of([1, 0, 2])
    assert _parts(rows)[:2] == [([], []), ([], [])]
    assert _objective().draw(rows).tensors["is_pair"].tolist() == [False, False, True]


def test_a_cut_belongs_to_the_row_and_the_step() -> None:
    first, again, later = (_parts(rows_of([9] * 20, step)) for step in (3, 3, 4))
    assert first == again != later
    rows, some = rows_of([9] * 20, 3), torch.tensor([7, 3])
    part = Rows(some, RowNoise(0, 3, some), rows.weight[some], rows.histories.select(some))
    assert _parts(part) == [first[7], first[3]]


# --- the other segment --------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 3, 10])
def test_no_row_is_set_its_own_segment_and_none_is_set_to_two(num: int) -> None:
    partners = set()
    for lot in range(-20, 20):
        chosen, has_other = other_rows(torch.arange(num), lot)
        assert has_other
        assert sorted(chosen.tolist()) == list(range(num))
        assert (chosen != torch.arange(num)).all()
        partners.add(int(chosen[0]))
    assert partners == set(range(1, num))


def test_the_other_row_depends_neither_on_the_order_of_the_rows_nor_on_padding() -> None:
    sorted_rows = torch.tensor([1, 4, 5, 8, 9])
    expected, _ = other_rows(sorted_rows, 123)
    of_row = dict(zip(sorted_rows.tolist(), sorted_rows[expected].tolist(), strict=True))
    # As three ranks would gather them
    dealt = torch.tensor([4, 9, 1, NO_ROW, 5, 8, NO_ROW, NO_ROW])
    chosen, _ = other_rows(dealt, 123)
    is_row = dealt < NO_ROW
    assert {
        int(row): int(dealt[place])
        for row, place in zip(dealt[is_row], chosen[is_row], strict=True)
    } == of_row


@pytest.mark.parametrize("numbers", [[3, NO_ROW], [NO_ROW], [NO_ROW, NO_ROW]])
def test_one_row_or_none_has_no_other(numbers: list[int]) -> None:
    chosen, has_other = other_rows(torch.tensor(numbers), 5)
    assert not has_other
    assert len(chosen) == len(numbers)


# --- loss ---------------------------------------------------------------------------------------


def _loss(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective's total, and the logit of every A (row) with every B (column)."""
    objective = _objective()
    table, backbone = torch.randn(1000, 16), Transformer(MODEL, 1000)
    drawn = embedded(objective.draw(rows), table)
    got = objective.loss(backbone, drawn, rows, None)
    assert got.weight == drawn.tensors["is_pair"].sum()
    num = rows.num_rows
    encoded = backbone.encode_users(torch.full((2 * num,), -1), drawn.vectors["segments"])
    a, b = F.layer_norm(encoded, (16,)).detach().chunk(2)
    return got.total.detach(), a @ objective.bilinear.detach().T @ b.T / 4 + 0.3


def test_loss_is_the_cross_entropy_of_the_own_segment_and_anothers() -> None:
    total, logits = _loss(rows_of([5, 1, 9, 0, 4]))
    real = [0, 2, 4]
    y, no = torch.ones(()), torch.zeros(())
    bce = F.binary_cross_entropy_with_logits
    possible = [
        sum(
            (bce(logits[i, i], y) + bce(logits[i, real[(at + shift) % 3]], no)) / 2
            for at, i in enumerate(real)
        )
        for shift in (1, 2)
    ]
    closest = min(abs(float(total - expected)) for expected in possible)
    assert closest < 1e-5  # float32 of about 2
    assert abs(float(possible[0] - possible[1])) > 1e-4


def test_a_single_row_has_its_own_segment_alone() -> None:
    total, logits = _loss(rows_of([5, 1, 0]))
    expected = F.binary_cross_entropy_with_logits(logits[0, 0], torch.ones(()))
    torch.testing.assert_close(total, expected)


def test_a_batch_without_pairs_has_a_loss_of_zero_and_a_finite_gradient() -> None:
    objective = _objective()
    rows = rows_of([1, 0])
    backbone = Transformer(MODEL.model_copy(update={"similarity": "cosine"}), 1000)
    drawn = embedded(objective.draw(rows), torch.randn(1000, 16))
    got = objective.loss(backbone, drawn, rows, None)
    got.total.backward()
    assert got.total == got.weight == 0
    for parameter in [*backbone.blocks.parameters(), *objective.parameters()]:
        assert parameter.grad is not None  # DDP wants the same graph from every rank
        assert (parameter.grad == 0).all()


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {"attention": "causal"},
        {"attention": "bidirectional", "similarity": "cosine"},
        {"backbone": "two_tower", "hidden_dims": (12,)},
        {"backbone": "autoencoder"},
    ],
    ids=["causal", "bidirectional", "two_tower", "autoencoder"],
)
def test_it_lowers_its_own_loss_on_every_backbone(
    cycle_with_features: PreparedDataset,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 40)  # of four steps
    config = tiny_config(
        cycle_with_features.path,
        FEATURES,
        model={"dim": 16, "max_length": 8, "dropout": 0, **model},
        pretrain={
            "batch_size": 10,
            "learning_rate": 0.003,
            "warmup_steps": 0,
            "objectives": [{"name": "next_segment"}],
        },
    )
    case = {"config": config.model_dump(mode="json")}
    found = losses.train(case, cycle_with_features, ranks)["losses"]
    last = torch.tensor(found)[-40:].mean()
    # Who only knows that half the answers are yes has log 2 = 0.693. Other cuts move ten epochs'
    # mean by about 0.01.
    assert last < 0.675 < found[0][0], last
