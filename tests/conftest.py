"""A small data set with something to learn, and configurations around it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.data.batch import Draw, Embedded, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.prepare import prepare
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.rng import RowNoise

NUM_USERS, NUM_ITEMS = 37, 30

KINDS = ("a|b", "b", "", "c|a|b")
# Of each kind and entity; the columns stand in the log itself.
FEATURES = [
    {"column": "colour", "of": "item", "kind": "categorical"},
    {"column": "kinds", "of": "item", "kind": "categorical", "separator": "|"},
    {"column": "age", "of": "user", "kind": "numeric"},
    {"column": "hour", "of": "interaction", "kind": "categorical"},
]

# A run for the shell, over `write_cycle`'s log; what follows the last line is a test's own.
RUN = """\
run_dir = "{run_dir}"
[data]
format = "tsv"
path = "{log}"
columns = {{ rating = "rating", timestamp = "timestamp" }}
[model]
dim = 16
num_layers = 1
max_length = 8
[pretrain]
epochs = {epochs}
batch_size = 10
objectives = [{{ name = "masked_item" }}]
"""

# Tensors of a few dozen rows are slower on many threads than on one.
torch.set_num_threads(1)


def write_cycle(path: Path) -> None:
    """Each user walks the items in a circle from a start of their own, with rare leaps."""
    draw = random.Random(0)
    lines = ["user_id\titem_id\trating\ttimestamp\tcolour\tkinds\tage\thour"]
    for user in range(NUM_USERS):
        item = draw.randrange(NUM_ITEMS)
        for time in range(draw.randint(4, 14)):
            rating = draw.randint(1, 5)
            side = f"{'red' if item % 3 else 'blue'}\t{KINDS[item % 4]}\t{20 + user}\t{time % 3}"
            lines.append(f"u{user}\ti{item}\t{rating}\t{time}\t{side}")
            item = (item + (1 if draw.random() < 0.9 else draw.randrange(NUM_ITEMS))) % NUM_ITEMS
    path.write_text("\n".join(lines) + "\n")


def tiny_config(
    folder: Path, features: Sequence[Mapping[str, Any]] = (), **sections: Any
) -> RunConfig:
    """A run over the circle; `sections` replace or add top-level sections."""
    raw: dict[str, Any] = {
        "run_dir": folder / "run",
        "data": {
            "format": "tsv",
            "path": folder / "log.tsv",
            "columns": {"rating": "rating", "timestamp": "timestamp"},
            "features": features,
        },
        "model": {"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0.1},
        "pretrain": {
            "epochs": 2,
            "batch_size": 10,
            "warmup_steps": 0,
            "objectives": [{"name": "masked_item"}],
        },
        **sections,
    }
    return RunConfig.model_validate(raw)


def rows_of(lengths: list[int], step: int = 0) -> Rows:
    """Row r holds the items 100 r, 100 r + 1, …, so that an item tells its row and place."""
    values = [100 * row + place for row, num in enumerate(lengths) for place in range(num)]
    return Rows(
        users=torch.arange(len(lengths)),
        histories=Jagged.from_lengths(
            torch.tensor(values, dtype=torch.int64), torch.tensor(lengths)
        ),
        noise=RowNoise(0, step, torch.arange(len(lengths))),
        weight=(torch.tensor(lengths) > 0).float(),
    )


def embedded(draw: Draw, table: Tensor, **changed: Tensor) -> Embedded:
    """A draw as the learner looks it up in a table (N, D); some tensors replaced."""
    return Embedded(draw.lookups, table, draw.lookups, {**draw.tensors, **changed})


@pytest.fixture(scope="session")
def cycle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cycle")
    write_cycle(folder / "log.tsv")
    return folder


@pytest.fixture(scope="session")
def cycle(cycle_folder: Path) -> PreparedDataset:
    config = tiny_config(cycle_folder)
    prepare(config.data, cycle_folder / "prepared", 0)
    return PreparedDataset.load(cycle_folder / "prepared")


@pytest.fixture(scope="session")
def cycle_with_features(cycle_folder: Path) -> PreparedDataset:
    config = tiny_config(cycle_folder, FEATURES)
    prepare(config.data, cycle_folder / "prepared_with_features", 0)
    return PreparedDataset.load(cycle_folder / "prepared_with_features")


@pytest.fixture(scope="session")
def finished_run(cycle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A small run of every task over items with features; not to be written into."""
    steps = {"epochs": 2, "batch_size": 10, "warmup_steps": 0}
    config = tiny_config(
        cycle_folder,
        FEATURES,
        pretrain={
            **steps,
            "epochs": 10,
            "learning_rate": 0.02,
            "objectives": [{"name": "masked_item"}],
        },
        finetune={
            "ranking": steps,
            "ctr": {**steps, "positive_rating": 3},
            "rating": {**steps, "control": "scratch"},
        },
        evaluate={"ks": [5], "baselines": ["popularity"]},
    ).model_copy(update={"run_dir": tmp_path_factory.mktemp("finished_run")})
    with joined_ranks():
        pipeline.prepare(config)
        pipeline.pretrain(config)
        pipeline.finetune(config)
        pipeline.evaluate(config)
    return config
