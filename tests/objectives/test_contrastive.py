"""Contrastive pretraining: each augmentation, the pairs, both losses, and that they learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import Contrastive, TransformerConfig
from torchrec_pt.data.batch import Draw, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.contrastive import ContrastiveObjective
from torchrec_pt.rng import RowNoise

MODEL = TransformerConfig(dim=16, num_layers=1, max_length=11, dropout=0, attention="bidirectional")
READ = 10  # a bidirectional model appends [MASK]
COUNTS = torch.arange(1, 1001)


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


NEW = 50_000  # what an augmentation brings in is told from what was there
OTHERS = (torch.arange(NEW) + NEW).repeat(2)  # the most correlated item of each


def _objective(**options: Any) -> ContrastiveObjective:
    config = Contrastive(name="contrastive", **options)
    return ContrastiveObjective(config, MODEL, COUNTS, seed=0, most_correlated=OTHERS)


def _views(draw: Draw) -> list[tuple[list[int], list[bool]]]:
    """Items and mask of each view; all first views, then all second ones."""
    views = draw.lookups["views"]
    lengths = views.lengths.tolist()
    masks = draw.tensors["is_masked"].split(lengths)
    return [
        (items.tolist(), mask.tolist())
        for items, mask in zip(views.values.split(lengths), masks, strict=True)
    ]


# --- views --------------------------------------------------------------------------------------


def test_a_crop_is_an_unbroken_part_of_the_configured_length() -> None:
    objective = _objective(augmentations=("crop",), crop_fraction=0.55)
    starts = set()
    for step in range(40):
        for view, (items, mask) in enumerate(_views(objective.draw(rows_of([10, 1, 3, 0], step)))):
            row = view % 4
            assert len(items) == [5, 1, 1, 0][row]  # rounded down, one at least
            if items:
                assert items == list(range(items[0], items[0] + len(items)))
                assert items[0] // 100 == row
            assert not any(mask)
            if row == 0:
                starts.add(items[0])
    assert starts == set(range(6))


def test_a_mask_hides_items_at_its_rate_and_moves_none() -> None:
    objective = _objective(augmentations=("mask",), mask_fraction=0.3)
    views = _views(objective.draw(rows_of([10] * 500)))
    for view, (items, _) in enumerate(views):
        first = 100 * (view % 500)
        assert items == list(range(first, first + 10))
    rate = sum(sum(mask) for _, mask in views) / 10_000
    assert abs(rate - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5


def test_a_reorder_permutes_one_unbroken_part_of_the_configured_length() -> None:
    objective = _objective(augmentations=("reorder",), reorder_fraction=0.45)
    moved_places: set[int] = set()
    num_moved = 0
    for view, (items, mask) in enumerate(_views(objective.draw(rows_of([10] * 8 + [1, 0])))):
        row = view % 10
        first = 100 * row
        assert sorted(items) == list(range(first, first + [10, 1, 0][max(0, row - 7)]))
        moved = [place for place, item in enumerate(items) if item != first + place]
        if moved:
            assert moved[-1] - moved[0] < 4
            num_moved += 1
        moved_places |= set(moved)
        assert not any(mask)
    # A part of four stays in order once in 24; of 16 views most must have moved.
    assert num_moved >= 12
    assert len(moved_places) >= 8


def test_a_substitute_replaces_the_configured_part_by_correlated_items() -> None:
    objective = _objective(augmentations=("substitute",), substitute_fraction=0.35)
    counts = torch.zeros(10)
    for view, (items, mask) in enumerate(_views(objective.draw(rows_of([10, 1, 4, 0] * 50)))):
        first = 100 * (view % 200)
        assert [item % NEW for item in items] == list(range(first, first + len(items)))
        replaced = [place for place, item in enumerate(items) if item >= NEW]
        assert len(items) == [10, 1, 4, 0][view % 4]
        assert len(replaced) == [3, 1, 1, 0][view % 4]  # rounded down, one at least
        assert not any(mask)
        if view % 4 == 0:
            counts[replaced] += 1
    # 100 views replace each place 30 times on average.
    assert abs(counts - 30).max() < 5 * (100 * 0.3 * 0.7) ** 0.5


def test_an_insert_puts_correlated_items_before_theirs_and_keeps_the_newest() -> None:
    objective = _objective(augmentations=("insert",), insert_fraction=0.4)
    places = torch.zeros(6)
    for view, (items, mask) in enumerate(_views(objective.draw(rows_of([6, 10, 1, 0] * 25)))):
        row, kind = view % 100, view % 4
        own = [item for item in items if item < NEW]
        length = [6, 10, 1, 0][kind]
        # Four items go into ten, of which the model reads the last ten.
        assert len(items) == [8, READ, 2, 0][kind]
        assert own == list(range(100 * row + length - len(own), 100 * row + length))
        assert kind == 1 or len(own) == length
        for item, after in pairwise(items):
            assert item < NEW or item == NEW + after
        assert not items or items[-1] < NEW
        assert not any(mask)
        if kind == 0:
            places[[item % 100 for item in items if item >= NEW]] += 1
    # Each of six places in a third of 50 views
    assert abs(places - 50 / 3).max() < 5 * (50 / 3 * 2 / 3) ** 0.5


def test_rows_that_are_neither_substituted_nor_inserted_into_stay_as_they_were() -> None:
    objective = _objective(augmentations=("dropout", "insert", "substitute"))
    views = _views(objective.draw(rows_of([5] * 300)))
    as_they_were = [items for items, _ in views if max(items) < NEW]
    assert abs(len(as_they_were) - 200) < 5 * (600 * 2 / 9) ** 0.5
    assert all(len(items) == 5 for items in as_they_were)


def test_correlated_items_change_with_the_step_and_stay_with_the_row() -> None:
    objective = _objective(augmentations=("insert", "substitute"))
    first, again, later = (_views(objective.draw(rows_of([9] * 8, step))) for step in (0, 0, 1))
    assert first == again
    assert first != later
    rows = rows_of([9] * 8)
    order = torch.tensor([6, 2])
    some = Rows(order, RowNoise(0, 0, order), rows.weight[order], rows.histories.select(order))
    alone = _views(objective.draw(some))
    assert alone == [first[6], first[2], first[8 + 6], first[8 + 2]]


def test_dropout_alone_leaves_both_views_as_they_were() -> None:
    views = _views(_objective(augmentations=("dropout",)).draw(rows_of([10, 2])))
    assert views[:2] == views[2:]
    assert views[0] == (list(range(10)), [False] * 10)


def test_both_views_are_of_one_window_and_drawn_apart() -> None:
    objective = _objective(augmentations=("mask",), mask_fraction=0.3)
    views = _views(objective.draw(rows_of([40] * 20)))
    assert [items for items, _ in views[:20]] == [items for items, _ in views[20:]]
    assert [len(items) for items, _ in views] == [READ] * 40
    assert sum(a[1] == b[1] for a, b in zip(views[:20], views[20:], strict=True)) < 5
    assert len({items[0] % 100 for items, _ in views}) > 5  # windows from anywhere


def test_each_view_takes_one_of_the_configured_augmentations_at_random() -> None:
    views = _views(_objective(augmentations=("crop", "mask")).draw(rows_of([10] * 500)))
    num_cropped = sum(len(items) == 6 for items, _ in views)
    assert abs(num_cropped - 500) < 5 * (1000 / 4) ** 0.5
    assert all(len(items) == 10 or not any(mask) for items, mask in views)


def test_views_loss_is_nt_xent_written_out() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(1000, 16), Transformer(MODEL, 1000)
    objective, rows = _objective(temperature=0.3), rows_of([10, 4, 0, 7])
    draw = objective.draw(rows)
    views = draw.lookups["views"]
    tokens = views.with_values(table[views.values])
    got = objective.loss(backbone, embedded(draw, table), rows, None)
    encoded = backbone.encode_users(torch.arange(8), tokens, is_masked=draw.tensors["is_masked"])
    unit = F.normalize(encoded.detach().double(), dim=1)
    real = [0, 1, 3, 4, 5, 7]  # row 2 is padding
    expected = 0.0
    for i in real:
        similar = {j: math.exp(float(unit[i] @ unit[j]) / 0.3) for j in real if j != i}
        expected -= math.log(similar[(i + 4) % 8] / sum(similar.values()))
    assert got.total.item() == pytest.approx(expected, rel=1e-5)  # float32
    assert got.weight == 6


# --- a user and the next item -------------------------------------------------------------------


def test_a_pair_is_a_history_and_the_item_right_after_it() -> None:
    draw = _objective(pairs="user_item").draw(rows_of([5, 1, 0, 40, 2]))
    history, item = draw.lookups["history"], draw.lookups["item"].values
    assert history.lengths.tolist() == [4, 0, 0, READ, 1]
    assert draw.tensors["has_target"].tolist() == [True, False, False, True, True]
    last = history.values[history.offsets[1:] - 1]
    assert torch.equal(item[[0, 3, 4]], last[[0, 3, 4]] + 1)
    assert draw.lookups["item"].lengths.tolist() == [1] * 5


def _pairs_expected(user: Tensor, item: Tensor, ids: list[int], real: list[int]) -> float:
    """Each real row's loss over the items of the real rows; a negative by its expected count."""
    share = COUNTS.double() / COUNTS.sum()
    total = 0.0
    for i in real:
        positive = math.exp(float(user[i] @ item[i]) / 0.3)
        negatives = sum(
            math.exp(float(user[i] @ item[j]) / 0.3) / ((len(real) - 1) * float(share[ids[j]]))
            for j in real
            if ids[j] != ids[i]
        )
        total -= math.log(positive / (positive + negatives))
    return total


def test_pairs_loss_is_corrected_infonce_written_out() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(1000, 16), Transformer(MODEL, 1000)
    objective = _objective(pairs="user_item", temperature=0.3)
    rows = rows_of([5, 1, 0, 9, 2, 3])
    draw = objective.draw(rows)
    # Rows 0 and 4 have the same next item: neither is a negative of the other.
    ids = draw.lookups["item"].values
    ids[4] = ids[0]
    drawn = embedded(draw, table)
    got = objective.loss(backbone, drawn, rows, None)
    user = F.normalize(
        backbone.encode_users(rows.users, drawn.vectors["history"]).detach().double(), dim=1
    )
    unit = F.normalize(table[ids].double(), dim=1)
    expected = _pairs_expected(user, unit, ids.tolist(), [0, 3, 4, 5])
    assert got.total.item() == pytest.approx(expected, rel=1e-5)  # float32
    assert got.weight == 4


def test_mixed_negatives_count_for_the_batch_and_for_what_was_drawn() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(1000, 16), Transformer(MODEL, 1000)
    negatives = {"num": 30, "distribution": "uniform"}
    objective = _objective(pairs="user_item", temperature=0.3, negatives=negatives)
    rows = rows_of([5, 1, 0, 9])
    draw = objective.draw(rows)
    positives, drawn_ids = draw.lookups["item"].values, draw.lookups["negatives"].values
    assert len(drawn_ids) == 30
    drawn_ids[3] = positives[0]  # an accidental hit of row 0, and a negative of row 3
    drawn = embedded(draw, table)
    got = objective.loss(backbone, drawn, rows, None)
    user = F.normalize(backbone.encode_users(rows.users, drawn.vectors["history"]), dim=1).double()
    share = COUNTS.double() / COUNTS.sum()
    real = [0, 3]
    ids = torch.cat([positives[real], drawn_ids])
    logits = user[real] @ F.normalize(table[ids].double(), dim=1).T / 0.3
    corrected = logits - (share[ids] + 30 / 1000).log()
    expected = torch.zeros(())
    for row in range(2):
        others = corrected[row, ids != ids[row]]
        positive = logits[row, row]
        expected = expected + torch.cat([positive[None], others]).logsumexp(0) - positive
    assert got.total.item() == pytest.approx(expected.item(), rel=1e-5)  # float32
    assert got.weight == 2


def test_views_with_sampled_items_are_refused_by_one_line() -> None:
    with pytest.raises(ValueError, match="views are set against views"):
        _objective(pairs="views", negatives={"num": 3})


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [False, True])
def test_the_temperature_is_learned_only_when_asked(learn: bool) -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(1000, 16), Transformer(MODEL, 1000)
    objective, rows = _objective(learn_temperature=learn, temperature=0.3), rows_of([10, 4])
    assert objective.temperature.item() == pytest.approx(0.3)
    draw = objective.draw(rows)
    drawn = embedded(draw, table)
    objective.loss(backbone, drawn, rows, None).total.backward()
    gradient = objective.log_temperature.grad
    assert (gradient is not None and bool(gradient != 0)) == learn


@pytest.mark.parametrize(
    "pairs",
    [
        {"pairs": "views"},
        {"pairs": "user_item"},
        {"augmentations": ["substitute", "insert"], "substitute_fraction": 0.3},
    ],
)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_it_lowers_its_own_loss(
    cycle: PreparedDataset,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    pairs: dict[str, Any],
    attention: str,
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 12)  # of four steps
    config = tiny_config(
        cycle.path,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "attention": attention},
        pretrain={
            "batch_size": 10,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "objectives": [{"name": "contrastive", "temperature": 0.2, **pairs}],
        },
    )
    found = losses.train({"config": config.model_dump(mode="json")}, cycle, ranks)["losses"]
    means = torch.tensor(found).view(12, 4).mean(1)
    # Another order of the users moves an epoch's mean by about 0.1.
    assert means[-2:].mean() < means[0] - 0.4, means
