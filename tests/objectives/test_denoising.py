"""Denoising: each corruption, what it asks, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import embedded, rows_of, tiny_config
from tests.training import losses
from torchrec_pt.config import Denoising, TransformerConfig, TwoTowerConfig
from torchrec_pt.data.batch import Embedded, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.objectives.denoising import DenoisingObjective
from torchrec_pt.rng import RowNoise

MODEL = TransformerConfig(dim=16, num_layers=1, max_length=40, dropout=0)
NUM_ITEMS = 500
EVERY = ("delete", "infill", "shuffle", "replace")


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _objective(**options: Any) -> DenoisingObjective:
    torch.manual_seed(0)
    return DenoisingObjective(Denoising(name="denoising", **options), MODEL, NUM_ITEMS)


def _corrupted(rows: Rows, *names: str, **options: Any) -> list[tuple[list[int], list[bool]]]:
    """Items and mask of each row."""
    draw = _objective(corruptions=names, **options).draw(rows)
    corrupted = draw.lookups["corrupted"]
    lengths = corrupted.lengths.tolist()
    masks = draw.tensors["is_masked"].split(lengths)
    return [
        (items.tolist(), mask.tolist())
        for items, mask in zip(corrupted.values.split(lengths), masks, strict=True)
    ]


# --- corruptions --------------------------------------------------------------------------------


def test_items_are_deleted_at_their_rate_and_the_others_keep_their_order() -> None:
    rows = _corrupted(rows_of([40] * 250), "delete", delete_fraction=0.3)
    for row, (items, mask) in enumerate(rows):
        assert items == sorted(items)
        assert {item // 100 for item in items} == {row}
        assert not any(mask)
    rate = 1 - sum(len(items) for items, _ in rows) / 10_000
    assert abs(rate - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5


@pytest.mark.parametrize("name", EVERY)
def test_a_row_that_has_an_item_keeps_one_and_an_empty_row_has_none(name: str) -> None:
    rows = rows_of([1, 0, 2] * 50)
    fractions = {f"{one}_fraction": 0.99 for one in EVERY}
    corrupted = _corrupted(rows, name, **fractions)
    for length, (items, _) in zip(rows.histories.lengths.tolist(), corrupted, strict=True):
        assert bool(items) == bool(length)
        assert len(items) <= length


def test_a_span_becomes_one_mask_and_what_is_around_stays() -> None:
    lengths = [40] * 300
    hidden_runs = []
    for row, (items, mask) in enumerate(_corrupted(rows_of(lengths), "infill")):
        first = 100 * row
        assert sum(mask) >= 1
        assert not any(a and b for a, b in pairwise(mask))
        shown = [item - first for item, hidden in zip(items, mask, strict=True) if not hidden]
        assert shown == sorted(set(shown))
        ends = [*[item - first for item in items[1:]], 40]
        for item, hidden, end in zip(items, mask, ends, strict=True):
            if hidden:
                hidden_runs.append(end - (item - first))
            else:
                assert end == item - first + 1
    share = sum(hidden_runs) / (40 * 300)
    # 0.3 less what overlaps: an item is hidden if one of the at most three or so before it begins
    # a span, 1 − (1 − 0.098)^3.05 = 0.27; less what a row's end cuts off, 1 in 20.
    assert 0.24 < share < 0.29


def test_spans_are_as_long_as_poissons() -> None:
    # At the lowest rate a row has one span; in 40 items few are cut off.
    runs = []
    for row, (items, mask) in enumerate(
        _corrupted(rows_of([40] * 2000), "infill", infill_fraction=1e-6)
    ):
        (at,) = [place for place, hidden in enumerate(mask) if hidden]
        ends = [*items[1:], 100 * row + 40]
        if items[at] % 100 < 28:
            runs.append(ends[at] - items[at])
    counts = torch.bincount(torch.tensor(runs)).double() / len(runs)
    # e^-3 (1 + 3), then e^-3 3^k / k!; five deviations of the 1,400 spans
    expected = torch.tensor([0.0, 0.1991, 0.2240, 0.2240, 0.1680, 0.1008], dtype=torch.float64)
    assert ((counts[:6] - expected).abs() <= 5 * (expected / len(runs)).sqrt()).all()


def test_a_shuffle_permutes_one_unbroken_part_of_the_configured_length() -> None:
    places: set[int] = set()
    for row, (items, mask) in enumerate(
        _corrupted(rows_of([10] * 50), "shuffle", shuffle_fraction=0.45)
    ):
        first = 100 * row
        assert sorted(items) == list(range(first, first + 10))
        moved = [place for place, item in enumerate(items) if item != first + place]
        assert not moved or moved[-1] - moved[0] < 4
        places |= set(moved)
        assert not any(mask)
    assert places == set(range(10))


def test_items_are_replaced_at_their_rate_by_items_from_the_whole_catalogue() -> None:
    rows = rows_of([40] * 250)
    replaced = []
    for row, (items, mask) in enumerate(_corrupted(rows, "replace", replace_fraction=0.2)):
        assert len(items) == 40
        assert not any(mask)
        replaced += [item for place, item in enumerate(items) if item != 100 * row + place]
    # One in 500 is replaced by itself, if row < 5.
    assert abs(len(replaced) / 10_000 - 0.2) < 5 * (0.2 * 0.8 / 10_000) ** 0.5
    by_item = torch.bincount(torch.tensor(replaced))
    assert len(by_item) <= NUM_ITEMS
    assert (by_item > 0).sum() > 0.95 * NUM_ITEMS  # each 4 times on average: e^-4 = 0.02
    assert by_item.max() < 20


def test_each_row_takes_one_of_the_configured_corruptions_at_random() -> None:
    rows = _corrupted(rows_of([10] * 1000), "infill", "shuffle")
    num_masked = sum(any(mask) for _, mask in rows)
    assert abs(num_masked - 500) < 5 * (1000 / 4) ** 0.5
    for items, mask in rows:
        assert any(mask) or len(items) == 10
        assert not any(mask) or items == sorted(items)


def test_a_corruption_belongs_to_the_row_and_the_step() -> None:
    first, again, later = (_corrupted(rows_of([30] * 40, step), *EVERY) for step in (0, 0, 1))
    assert first == again != later
    rows, order = rows_of([30] * 40), torch.tensor([7, 3, 21])
    some = Rows(order, RowNoise(0, 0, order), rows.weight[order], rows.histories.select(order))
    assert _corrupted(some, *EVERY) == [first[7], first[3], first[21]]


# --- loss ---------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_every_original_item() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(1000, 16), Transformer(MODEL, 1000)
    objective, rows = _objective(temperature=0.7), rows_of([4, 0, 9, 1, 2])
    draw = objective.draw(rows)
    drawn = embedded(draw, table)
    got = objective.loss(backbone, drawn, rows, Catalogue(table, 0, False))
    corrupted = drawn.vectors["corrupted"]
    encoded = backbone.encode_positions(corrupted, None, is_masked=draw.tensors["is_masked"])
    query = objective.decoder(drawn.vectors["history"], corrupted.with_values(encoded), None)
    logits = query.double() @ table.double().T / 0.7
    expected = F.cross_entropy(logits, rows.histories.values, reduction="sum")
    torch.testing.assert_close(got.total.double(), expected, rtol=1e-5, atol=0)  # float32
    assert got.weight == 16


def test_a_hidden_item_reaches_the_encoder_by_nothing() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(1000, 16), Transformer(MODEL, 1000)
    objective, rows = _objective(corruptions=["infill"]), rows_of([4, 5])
    draw = objective.draw(rows)
    drawn = embedded(draw, table)
    corrupted = drawn.ids["corrupted"]
    values = table[corrupted.values].requires_grad_()  # a row for each token
    places = corrupted.with_values(1000 + torch.arange(len(values)))
    drawn = Embedded(
        drawn.ids,
        torch.cat([table, values]),
        {**drawn.places, "corrupted": places},
        drawn.tensors,
    )
    objective.loss(backbone, drawn, rows, Catalogue(table, 0, False)).total.backward()
    assert values.grad is not None
    assert torch.equal((values.grad != 0).any(1), ~draw.tensors["is_masked"])


@pytest.mark.parametrize(
    "options",
    [{}, {"negatives": {"num": 10, "distribution": "uniform"}}],
    ids=["catalogue", "sampled"],
)
def test_it_lowers_its_own_loss(
    cycle: PreparedDataset, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 20)  # of four steps
    config = tiny_config(
        cycle.path,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0},
        pretrain={
            "batch_size": 10,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "objectives": [{"name": "denoising", **options}],
        },
    )
    found = losses.train({"config": config.model_dump(mode="json")}, cycle, ranks)["losses"]
    means = torch.tensor(found).view(20, 4).mean(1)
    # From chance, log 30 = 3.4, to about 1.1; other corruptions move an epoch's mean by about 0.1.
    assert means[-3:].mean() < means[0] * 0.6, means


def test_the_decoder_starts_from_the_seed_of_the_run(cycle: PreparedDataset) -> None:
    config = tiny_config(cycle.path, pretrain={"objectives": [{"name": "denoising"}]})
    first, again, other = (
        build_objectives(config.model_copy(update={"seed": seed}), cycle)[0].state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(first["decoder.begin"], again["decoder.begin"])
    assert not torch.equal(first["decoder.begin"], other["decoder.begin"])


def test_causal_attention_is_refused_by_one_line() -> None:
    causal = MODEL.model_copy(update={"attention": "causal"})
    with pytest.raises(ValueError, match=r'denoising .* "causal"; set it to "bidir') as caught:
        DenoisingObjective(Denoising(name="denoising"), causal, NUM_ITEMS)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_positions_is_refused_by_one_line() -> None:
    towers = TwoTowerConfig(backbone="two_tower")
    with pytest.raises(ValueError, match="denoising needs a vector at every position") as caught:
        DenoisingObjective(Denoising(name="denoising"), towers, NUM_ITEMS)
    assert "\n" not in str(caught.value)
