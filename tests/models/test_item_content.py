"""Item features in an item's vector, and what they are worth where an item has nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_config
from torchrec_pt import pipeline
from torchrec_pt.build import build_backbone
from torchrec_pt.config import ModelConfig, RunConfig, TransformerConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import load_entity_features
from torchrec_pt.models.item_content import ItemContent, RowHiding
from torchrec_pt.rng import RowNoise

DIM = 8


def _content(dataset: PreparedDataset, num_trained: int, row_dropout: float = 0.0) -> ItemContent:
    features = load_entity_features(dataset, "item")
    return ItemContent(features, DIM, RowHiding(row_dropout, num_trained))


def test_an_item_is_its_row_and_all_its_fields(cycle_with_features: PreparedDataset) -> None:
    content = _content(cycle_with_features, num_trained=100)
    ids = torch.tensor([4, 0, 7])
    rows = torch.randn(3, DIM)
    fields = content.features(ids)
    assert fields.shape == (3, 2, DIM)
    torch.testing.assert_close(content(ids, rows), rows + fields[:, 0] + fields[:, 1])


def test_the_row_of_an_untrained_item_counts_for_nothing(
    cycle_with_features: PreparedDataset,
) -> None:
    content = _content(cycle_with_features, num_trained=5)
    ids = torch.tensor([4, 5])
    rows = torch.randn(2, DIM)
    got, alone = content(ids, rows), content.features(ids).sum(1)
    assert not torch.allclose(got[0], alone[0])
    torch.testing.assert_close(got[1], alone[1])


def test_rows_are_hidden_by_item_and_step_alone(cycle_with_features: PreparedDataset) -> None:
    content = _content(cycle_with_features, num_trained=100, row_dropout=0.4)
    ids = torch.arange(30)
    rows, alone = torch.ones(30, DIM), content.features(ids).sum(1)

    def hidden(step: int, some: torch.Tensor) -> torch.Tensor:
        got = content(some, rows[some], RowNoise(0, step, some))
        return (got == alone[some]).all(1)

    first = hidden(1, ids)
    assert 0 < first.sum() < 30
    backwards = ids.flip(0)
    assert torch.equal(hidden(1, backwards), first.flip(0))
    assert not torch.equal(hidden(2, ids), first)
    share = torch.stack([hidden(step, ids) for step in range(200)]).float().mean()
    assert abs(share - 0.4) < 0.03  # 6000 lots: a standard error of 0.006


@pytest.mark.parametrize(
    "model",
    [
        TransformerConfig(row_dropout=0.1, item_content=False),
        TransformerConfig(row_dropout=0.1),
    ],
)
def test_hiding_rows_without_features_is_refused(
    model: ModelConfig, cycle: PreparedDataset
) -> None:
    with pytest.raises(ValueError, match="row_dropout: leaves items to their features, and none"):
        build_backbone(model, cycle)


# --- items that nobody took in training -----------------------------------------------------------

GROUPS, PER_GROUP = 5, 10


def _write_groups(path: Path) -> None:
    """Every user stays in one group of items; of each group two items are taken last alone."""
    draw = random.Random(1)
    lines = ["user_id\titem_id\trating\ttimestamp\tgroup"]
    for user in range(200):
        group = user % GROUPS
        taken = [*draw.sample(range(2, PER_GROUP), 5), draw.randrange(2)]
        for time, place in enumerate(taken):
            lines.append(f"u{user}\ti{group * PER_GROUP + place}\t1\t{time}\tg{group}")
    path.write_text("\n".join(lines) + "\n")


def _groups(folder: Path, **model: object) -> RunConfig:
    config = tiny_config(
        folder,
        [{"column": "group", "of": "item", "kind": "categorical"}],
        model={"dim": 16, "num_layers": 1, "max_length": 8, "attention": "causal", **model},
        pretrain={
            "epochs": 15,
            "batch_size": 32,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "validate_every": 15,
            "objectives": [{"name": "next_item"}],
        },
    )
    _write_groups(folder / "log.tsv")
    return config


@pytest.mark.parametrize(
    ("model", "least", "most"),
    [({"row_dropout": 0.3}, 0.9, 1.0), ({"item_content": False}, 0.0, 0.5)],
    ids=["with content", "without"],
)
def test_content_finds_items_that_nobody_took(
    model: dict[str, object], least: float, most: float, tmp_path: Path
) -> None:
    """The test items are the 10 that training never saw: 2 of a user's own group among 50 - 5."""
    config = _groups(tmp_path, **model)
    dataset = pipeline.prepare(config)
    assert int((dataset.item_counts == 0).sum()) == 2 * GROUPS
    pipeline.pretrain(config)
    found = pipeline.evaluate(config)["ranking"].metrics["pretrained"]
    assert least <= found["hr@10"] <= most
