"""Fine-tuning of a model that another run pretrained, over data that it partly knows."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.console import Console

from tests.conftest import FEATURES, tiny_config
from torchrec_pt import pipeline
from torchrec_pt.checkpoint import Checkpoint
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import join_ranks
from torchrec_pt.recommender import Recommender
from torchrec_pt.runs import finished_stages

STEPS = {"epochs": 1, "batch_size": 10, "warmup_steps": 0}
TABLE = "model.backbone.items.collection.embeddings.item.weight"
COLOUR = "model.backbone.content.features.tables.embedding_bags.item_colour.weight"


def _other_log(folder: Path) -> None:
    """The circle's items from i12 on, six that it does not have, and colours in another order."""
    log = pl.read_csv(folder.parent / "log.tsv", separator="\t")
    number = pl.col("item_id").str.slice(1).cast(pl.Int64) + 12
    colour = pl.when(number % 5 == 0).then(pl.lit("blue")).otherwise(pl.lit("green"))
    folder.mkdir()
    log.with_columns(
        item_id=pl.format("i{}", pl.when(number > 35).then(number - 24).otherwise(number)),
        colour=pl.when(number % 5 == 1).then(pl.lit("red")).otherwise(colour),
    ).write_csv(folder / "log.tsv", separator="\t")


@pytest.fixture(scope="module")
def source(cycle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("source")
    shutil.copy(cycle_folder / "log.tsv", folder)
    config = tiny_config(folder, FEATURES)
    pipeline.prepare(config)
    pipeline.pretrain(config)
    return config


def _target(source: RunConfig, **finetune: Any) -> RunConfig:
    folder = source.run_dir.parent / "other"
    if not folder.exists():
        _other_log(folder)
    return tiny_config(
        folder,
        FEATURES,
        pretrain=None,
        finetune={"start_from": source.run_dir / "pretrain", **finetune},
    )


def _colours(dataset: PreparedDataset) -> list[str]:
    known = dataset.vocabulary.filter((pl.col("of") == "item") & (pl.col("column") == "colour"))
    return known.sort("id")["value"].to_list()


def test_a_run_without_pretraining_fine_tunes_judges_and_serves_anothers_model(
    source: RunConfig,
) -> None:
    ctr = {**STEPS, "positive_rating": 3, "control": "scratch"}
    config = _target(source, ctr=ctr)
    screen = io.StringIO()
    result = pipeline.run(config, Console(file=screen, width=120))
    said = screen.getvalue()
    old = PreparedDataset.load(source.prepared_dir)
    new = PreparedDataset.load(config.prepared_dir)

    assert list(result.evaluation["ranking"].metrics) == ["pretrained"]
    assert list(result.evaluation["ctr"].metrics) == ["scratch", "fine-tuned"]
    assert len(Recommender.load(config.run_dir).recommend(new.users["external_id"][0], k=3)) == 3

    stages = finished_stages(config, new)
    assert list(stages) == ["pretrain", "finetune/ctr/pretrained", "finetune/ctr/scratch"]
    given = finished_stages(source, old)["pretrain"].checkpoint
    known, taken = (
        Checkpoint.open(path, join_ranks()) for path in (given, stages["pretrain"].checkpoint)
    )
    table, was = taken.read(TABLE), known.read(TABLE)
    ids = new.items["external_id"].to_list()
    where = {item: row for row, item in enumerate(old.items["external_id"])}
    num_new = 0
    for row, item in enumerate(ids):
        # A new item is its content to begin with.
        expected = was[where[item]] if item in where else torch.zeros(16)
        assert table[row].equal(expected), item
        num_new += item not in where
    assert num_new == 6
    rows = f"{len(ids) - 6} / 6 / {len(where) - len(ids) + 6}"
    lines = [line.strip() for line in said.splitlines()]
    assert any(rows in line for line in lines if line.startswith("item table")), said
    # So are the values of its features: green is a new one.
    colours, were = taken.read(COLOUR), known.read(COLOUR)
    assert sorted(_colours(new)) == ["blue", "green", "red"]
    for row, colour in enumerate(_colours(new), start=1):
        before = 0 if colour == "green" else 1 + _colours(old).index(colour)
        assert colours[row].equal(were[before]), colour
    page = (config.run_dir / "report.html").read_text()
    assert page.count("What moved from the pretrained model") == 2
    assert f"<td>{rows}</td>" in page


def test_what_a_run_started_from_may_change_or_go(source: RunConfig, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(source.run_dir / "pretrain", kept)
    config = _target(source, start_from=kept, ranking=STEPS)
    config = config.model_copy(update={"run_dir": tmp_path / "run"})
    pipeline.prepare(config)
    first = pipeline.finetune(config)["ranking"]["pretrained"]
    shutil.rmtree(kept)
    assert pipeline.finetune(config)["ranking"]["pretrained"].values == first.values
    shutil.rmtree(config.run_dir / "pretrain")
    with pytest.raises(ValueError, match=r"finetune\.start_from: .*kept holds no checkpoint; give"):
        pipeline.finetune(config)
