"""A model that was fine-tuned with a head is served with it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from tests.conftest import FEATURES, tiny_config, write_cycle
from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.recommender import Recommender

STEPS = {"epochs": 3, "batch_size": 10, "learning_rate": 0.02, "warmup_steps": 0}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with joined_ranks():
        yield


def _finished(folder: Path, head: str) -> tuple[RunConfig, str]:
    write_cycle(folder / "log.tsv")
    ranking: dict[str, Any] = {**STEPS, "loss": "bpr", "head": head}
    config = tiny_config(folder, FEATURES, finetune={"ranking": ranking})
    said = io.StringIO()
    pipeline.run(config, Console(file=said, width=200))
    return config, said.getvalue()


def _inner_products(config: RunConfig) -> dict[str, float]:
    """Of the first user with every item, by the exported vectors."""
    users, items = (
        pl.read_parquet(config.run_dir / "export" / f"{what}.parquet")
        for what in ("users", "items")
    )
    scores = items["embedding"].to_numpy() @ users["embedding"].to_numpy()[0]
    return dict(zip(items["id"], scores.tolist(), strict=True))


def _recommended(config: RunConfig) -> dict[str, float]:
    recommender = Recommender.load(config.run_dir)
    found = recommender.recommend(recommender.first_user, k=30, exclude_seen=False)
    return {str(one.item): one.score for one in found}


def test_a_linear_head_is_in_the_exported_vectors(tmp_path: Path) -> None:
    config, said = _finished(tmp_path, "linear")
    assert _recommended(config) == pytest.approx(_inner_products(config), rel=1e-3, abs=1e-4)
    assert "do not reproduce its ranking" not in said


def test_an_mlp_head_recommends_and_the_export_says_that_vectors_do_not(tmp_path: Path) -> None:
    config, said = _finished(tmp_path, "mlp")
    assert said.count("inner products of these vectors alone do not reproduce its ranking") == 1
    of_head, of_vectors = _recommended(config), _inner_products(config)
    assert of_head.keys() == of_vectors.keys()
    assert max(abs(of_head[item] - of_vectors[item]) for item in of_head) > 0.01
