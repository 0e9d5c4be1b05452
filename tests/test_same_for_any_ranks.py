"""Several processes evaluate, export and recommend what one does, to the last bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.conftest import FEATURES, KINDS, tiny_config

WORKER = Path(__file__).parent / "any_ranks.py"
STEPS = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01}
TASKS = {"ctr": {**STEPS, "positive_rating": 3}, "rating": STEPS, "ranking": {**STEPS}}
# Three blocks of items, whose last is not whole: of five ranks, two have none.
NUM_ITEMS = 1100
# Users begin at different times; by time some have no training row, others no test row.
BY_TIME = {"rule": "temporal", "valid_from": 25, "test_from": 40}
TOWERS = {
    "backbone": "two_tower",
    "dim": 24,
    "hidden_dims": [20],
    "max_length": 8,
    "item_table": {"placement": "row_wise", "optimizer": "rowwise_adagrad"},
}
TRANSFORMER = {"dim": 24, "num_layers": 1, "max_length": 8}
PAIRS = {**STEPS, "objectives": [{"name": "contrastive", "pairs": "user_item"}]}
# Of each case, the numbers of ranks beside 1. "few users": more ranks than parts of the data.
RANKS = {"transformer": (2, 3, 5), "two_tower row_wise": (2, 3, 5), "few users": (7,)}
EXPORTS: dict[str, dict[str, Any]] = {
    "transformer": {"formats": ["parquet", "npy"], "dtype": "int8"},
    "two_tower row_wise": {"formats": ["parquet", "npy", "safetensors", "faiss", "csv", "jsonl"]},
    "few users": {"what": ["users"], "formats": ["parquet", "npy"]},  # and "ids"
}
# The files of an evaluation and what is recommended, and those of an export with its manifests.
NUM_FILES = {"transformer": 6 + 12, "two_tower row_wise": 6 + 30, "few users": 6 + 5}


def _write_log(path: Path, num_users: int) -> None:
    draw = random.Random(0)
    lines = ["user_id\titem_id\trating\ttimestamp\tcolour\tkinds\tage\thour"]
    for user in range(num_users):
        first = user * NUM_ITEMS // num_users  # all items are taken by somebody
        for turn in range(max(4, NUM_ITEMS // num_users)):
            item = first + turn if draw.random() < 0.9 else draw.randrange(NUM_ITEMS)
            side = f"{'red' if item % 3 else 'blue'}\t{KINDS[item % 4]}\t{20 + user}\t{turn % 3}"
            rating = draw.randint(1, 10) / 2
            lines.append(f"u{user}\ti{item}\t{rating}\t{turn + user % 30}\t{side}")
    path.write_text("\n".join(lines) + "\n")


def _write_candidates(folder: Path) -> str:
    path = folder / "candidates.parquet"
    users = [user for user in range(5) for _ in range(20)]
    items = [f"i{(37 * n) % (NUM_ITEMS + 50)}" for n in range(100)]
    pl.DataFrame({"user": [f"u{user}" for user in users], "item": items}).write_parquet(path)
    return str(path)


def _case(folder: Path, num_users: int, split: dict[str, Any], **sections: Any) -> dict[str, Any]:
    folder.mkdir()
    _write_log(folder / "log.tsv", num_users)
    config = tiny_config(folder, FEATURES, **sections)
    raw = config.model_dump(mode="json")
    raw["data"]["split"] = split
    raw["evaluate"] |= {
        "baselines": ["popularity", "item_knn", "biases"],
        "batch_size": 3,
        "candidates": {"num": 99},
    }
    return raw


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any_ranks")
    bpr = {**TASKS, "ranking": {**STEPS, "loss": "bpr"}}
    mlp = {**TASKS, "ranking": {**STEPS, "loss": "bpr", "head": "mlp"}}
    linear = {**TASKS, "ranking": {**STEPS, "head": "linear"}}
    last = {"rule": "leave_one_out"}
    configs = {
        "transformer": _case(folder / "a", 50, last, model=TRANSFORMER, finetune=mlp),
        "two_tower row_wise": _case(
            folder / "b", 50, BY_TIME, model=TOWERS, pretrain=PAIRS, finetune=linear
        ),
        "few users": _case(folder / "c", 5, last, model=TRANSFORMER, finetune=bpr),
    }
    for name, export in EXPORTS.items():
        configs[name]["export"] = export
    (folder / "c/users.txt").write_text("u3\nu0\nu4\n")
    configs["few users"]["export"]["ids"] = str(folder / "c/users.txt")
    configs["few users"]["evaluate"]["candidates"] = {"path": _write_candidates(folder / "c")}
    cases = {
        name: {"config": config, "user": "u3", "ranks": [1, *RANKS[name]]}
        for name, config in configs.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run(
        [sys.executable, WORKER, folder, folder / "cases.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    return folder


@pytest.mark.parametrize(
    ("case", "num_ranks"), [(case, num) for case, ranks in RANKS.items() for num in ranks]
)
def test_several_ranks_evaluate_export_and_recommend_the_same_bytes(
    results: Path, case: str, num_ranks: int
) -> None:
    one, several = (_files(results / case / str(num)) for num in (1, num_ranks))
    assert one.keys() == several.keys()
    assert [name for name in one if one[name] != several[name]] == []
    assert len(one) == NUM_FILES[case]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
