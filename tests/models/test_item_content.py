"""Item features in an item's vector, and what they are worth where an item has nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from tests.conftest import tiny_config
from torchrec_pt import pipeline
from torchrec_pt.build import build_backbone
from torchrec_pt.config import (
    AutoencoderConfig,
    ModelConfig,
    RunConfig,
    TransformerConfig,
    TwoTowerConfig,
)
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import load_entity_features, new_item_features
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.models.item_content import ItemContent, RowHiding
from torchrec_pt.rng import RowNoise
from torchrec_pt.scoring import encode_histories, encode_item_range
from torchrec_pt.served import load_served

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


@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(dim=8, num_layers=1),
        TwoTowerConfig(backbone="two_tower", dim=8, hidden_dims=(8,)),
        AutoencoderConfig(backbone="autoencoder", dim=8),
    ],
)
def test_new_items_are_encoded_as_those_whose_rows_are_hidden(
    cycle_with_features: PreparedDataset, config: ModelConfig
) -> None:
    model = build_backbone(config, cycle_with_features).eval()
    ids = torch.arange(7)
    rows = torch.zeros(7, model.items.dim)
    right = model.encode_items(ids, model.represent(ids, rows))
    said = cycle_with_features.items.select("colour", "kinds").head(7).to_dicts()
    new = new_item_features(cycle_with_features, said)
    torch.testing.assert_close(model.encode_new_items(new, torch.device("cpu")), right.detach())
    # The model itself still is of its own items.
    torch.testing.assert_close(model.encode_items(ids, model.represent(ids, rows)), right)


def test_without_item_features_no_new_item_is_known(
    cycle: PreparedDataset, cycle_with_features: PreparedDataset
) -> None:
    model = build_backbone(TransformerConfig(dim=8, num_layers=1), cycle)
    new = new_item_features(cycle_with_features, [{"colour": "red"}])
    with pytest.raises(ValueError, match="the model reads no item features"):
        model.encode_new_items(new, torch.device("cpu"))


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
        TwoTowerConfig(backbone="two_tower", row_dropout=0.1),
    ],
)
def test_hiding_rows_without_features_is_refused(
    model: ModelConfig, cycle: PreparedDataset
) -> None:
    with pytest.raises(ValueError, match="row_dropout: leaves items to their features, and none"):
        build_backbone(model, cycle)


# --- items that nobody took in training -----------------------------------------------------------

GROUPS, PER_GROUP, WIDTH = 5, 10, 8
UNSEEN = 2  # of each group: taken last alone, or not at all
CAUSAL = {"num_layers": 1, "attention": "causal"}
TOWERS = {"backbone": "two_tower", "hidden_dims": [16]}


def _vector(item: int) -> list[float]:
    """Near the others of its group, and long: a layer should not mind the units."""
    draw = random.Random(item)
    own = item // PER_GROUP
    return [round(draw.gauss(100.0 * (place == own), 20.0), 3) for place in range(WIDTH)]


def _taken(held_out: bool) -> list[tuple[int, int, int]]:
    """(user, item, time): every user stays in one group of items."""
    draw = random.Random(1)
    rows = []
    for user in range(200):
        group = user % GROUPS
        places = draw.sample(range(UNSEEN, PER_GROUP), 5)
        places += [draw.randrange(UNSEEN)] if held_out else []
        rows += [(user, group * PER_GROUP + place, time) for time, place in enumerate(places)]
    return rows


def _write(folder: Path, format: str, held_out: bool) -> dict[str, Any]:
    """The log and what a [data] section says of it; each item's group, or a vector near it."""
    rows = _taken(held_out)
    path = folder / f"log.{'inter' if format == 'recbole' else format}"
    vector: dict[str, Any] = {"column": "vector", "of": "item", "kind": "vector"}
    if format == "parquet":
        columns = ["user_id", "item_id", "timestamp"]
        frame = pl.DataFrame(rows, schema=columns, orient="row")
        cells = [_vector(item) for _, item, _ in rows]
        frame.with_columns(vector=pl.Series(cells)).write_parquet(path)
    elif format == "csv":
        vector["separator"] = " "
        lines = [f"{u},{i},{t},g{i // PER_GROUP},{_cell(i)}" for u, i, t in rows]
        path.write_text("\n".join(["user_id,item_id,timestamp,group,vector", *lines]) + "\n")
    else:
        header = "user_id:token\titem_id:token\ttimestamp:float"
        path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n")
        lines = [f"{item}\t{_cell(item)}" for item in range(GROUPS * PER_GROUP)]
        side = "\n".join(["item_id:token\tvector:float_seq", *lines]) + "\n"
        path.with_suffix(".item").write_text(side)
    return {
        "format": format,
        "path": path,
        "columns": {"timestamp": "timestamp"},
        "features": [vector],
    }


def _cell(item: int) -> str:
    return " ".join(map(str, _vector(item)))


def _run(folder: Path, data: dict[str, Any], model: dict[str, Any], epochs: int = 15) -> RunConfig:
    objective = {"name": "next_item" if model.get("attention") == "causal" else "masked_item"}
    if model.get("backbone") == "two_tower":
        objective = {"name": "contrastive", "pairs": "user_item"}
    return tiny_config(
        folder,
        data=data,
        model={"dim": 16, "max_length": 8, **model},
        pretrain={
            "epochs": epochs,
            "batch_size": 32,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "validate_every": epochs,
            "objectives": [objective],
        },
    )


# format, feature, model, epochs: a bidirectional model leaves its plateau late
CASES = {
    "categories": ("csv", "group", CAUSAL, 15),
    "vectors in text cells": ("csv", "vector", {"num_layers": 1}, 40),
    "vectors in lists": ("parquet", "vector", TOWERS, 15),
}


@pytest.mark.parametrize("case", list(CASES))
def test_content_finds_items_that_nobody_took(case: str, tmp_path: Path) -> None:
    """The test items are the 10 that training never saw: 2 of a user's own group among 50 - 5."""
    format, feature, model, epochs = CASES[case]
    data = _write(tmp_path, format, held_out=True)
    if feature == "group":
        data["features"] = [{"column": "group", "of": "item", "kind": "categorical"}]
    config = _run(tmp_path, data, {**model, "row_dropout": 0.3}, epochs)
    dataset = pipeline.prepare(config)
    assert int((dataset.item_counts == 0).sum()) == UNSEEN * GROUPS
    pipeline.pretrain(config)
    found = pipeline.evaluate(config)["ranking"].metrics["pretrained"]
    assert found["hr@10"] >= 0.9


def test_without_content_items_that_nobody_took_stay_lost(tmp_path: Path) -> None:
    data = _write(tmp_path, "csv", held_out=True)
    config = _run(tmp_path, data, {**CAUSAL, "item_content": False})
    pipeline.prepare(config)
    pipeline.pretrain(config)
    found = pipeline.evaluate(config)["ranking"].metrics["pretrained"]
    assert found["hr@10"] <= 0.5


@pytest.mark.parametrize("model", [CAUSAL, TOWERS], ids=["transformer", "two towers"])
def test_content_places_items_of_the_item_file_alone(model: dict[str, Any], tmp_path: Path) -> None:
    """Among the 10 items without an interaction, the 2 of a user's own group come first."""
    data = {**_write(tmp_path, "recbole", held_out=False), "keep_unseen_items": True}
    config = _run(tmp_path, data, {**model, "row_dropout": 0.3})
    dataset = pipeline.prepare(config)
    is_new = dataset.item_counts == 0
    pipeline.pretrain(config)
    with joined_ranks() as ranks:
        backbone = load_served(config.run_dir, ranks).learner.backbone
        users = torch.arange(dataset.num_users)
        queries = encode_histories(backbone, users, dataset.history("test"))
        scores = queries @ encode_item_range(backbone, 0, dataset.num_items).T
    first = scores.masked_fill(~is_new, -torch.inf).topk(UNSEEN, dim=1).indices
    group = torch.tensor([int(i) // PER_GROUP for i in dataset.items["external_id"]])
    own = torch.tensor([int(u) % GROUPS for u in dataset.users["external_id"]])
    assert (group[first] == own.unsqueeze(1)).float().mean() > 0.7  # by chance 0.2


@pytest.mark.parametrize(
    "model",
    [CAUSAL, TOWERS, {"backbone": "autoencoder"}],
    ids=["transformer", "two towers", "autoencoder"],
)
def test_an_untrained_item_is_a_function_of_its_features_alone(
    model: dict[str, Any], tmp_path: Path
) -> None:
    config = _run(tmp_path, _write(tmp_path, "parquet", held_out=True), model)
    dataset = pipeline.prepare(config)
    backbone = build_backbone(config.model, dataset)
    is_new = dataset.item_counts == 0
    ids = torch.arange(dataset.num_items)

    def encode(rows: torch.Tensor) -> torch.Tensor:
        return backbone.encode_items(ids, backbone.represent(ids, rows))

    before, after = (encode(torch.randn(len(ids), backbone.items.dim)) for _ in range(2))
    assert torch.equal(before[is_new], after[is_new])
    assert ((before - after)[~is_new].abs().amax(1) > 0.01).all()
    assert before[is_new].unique(dim=0).shape == before[is_new].shape  # of each its own vector
