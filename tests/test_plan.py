"""The plan says where the tables are and what they take there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import FEATURES, NUM_ITEMS, tiny_config
from torchrec_pt import pipeline
from torchrec_pt.plan import TablePlan, render_plan

DIM = 16


def _pretrained(folder: Path, run_dir: Path, console: Console, **table: Any) -> Any:
    """plan.json of a run with an item table like that, and tables of features."""
    model = {"backbone": "two_tower", "dim": DIM, "max_length": 8, "item_table": table}
    pretrain = {
        "epochs": 1,
        "batch_size": 10,
        "objectives": [{"name": "contrastive", "pairs": "user_item"}],
    }
    config = tiny_config(folder, FEATURES, model=model, pretrain=pretrain)
    config = config.model_copy(update={"run_dir": run_dir})
    pipeline.prepare(config)
    pipeline.pretrain(config, console=console)
    return json.loads((run_dir / "pretrain/plan.json").read_text())


@pytest.mark.parametrize(
    ("table", "kind", "bytes_of_a_row"),
    [
        ({}, "replicated", 3 * 4 * DIM),
        ({"placement": "replicated", "optimizer": "rowwise_adagrad"}, "replicated", 4 * DIM + 4),
        ({"placement": "row_wise"}, "row_wise", 4 * DIM + 4),
        ({"placement": "column_wise", "optimizer": "adagrad"}, "column_wise", 2 * 4 * DIM),
        ({"placement": "table_wise", "optimizer": "sgd"}, "table_wise", 4 * DIM),
    ],
    ids=["adamw", "dense rowwise_adagrad", "rowwise_adagrad", "adagrad", "sgd"],
)
def test_a_stage_leaves_the_plan_of_all_its_tables(
    cycle_folder: Path, tmp_path: Path, table: dict[str, Any], kind: str, bytes_of_a_row: int
) -> None:
    console = Console(record=True, width=100, quiet=False)
    plans = {plan["table"]: plan for plan in _pretrained(cycle_folder, tmp_path, console, **table)}
    assert plans.keys() == {"item", "item_colour", "item_kinds"}
    item = plans["item"]
    # AdamW's count of steps is one number more.
    num_bytes = NUM_ITEMS * bytes_of_a_row + (4 if not table else 0)
    assert item["bytes_per_rank"] == [num_bytes]
    assert (item["rows"], item["dim"], item["kind"]) == (NUM_ITEMS, DIM, kind)
    assert {plans[name]["kind"] for name in plans if name != "item"} == {"replicated"}
    assert all(plan["ranks"] == [0] for plan in plans.values())
    # A lone process that holds its tables says nothing of it.
    assert ("MB per rank" in console.export_text()) == (kind != "replicated")


def test_the_table_shows_ranks_as_ranges_and_the_least_and_most_megabytes() -> None:
    plans = [
        TablePlan("item", 1_000_000, 32, "row_wise", [2**20, 2**20, 2**19, 0, 2**20]),
        TablePlan("user_age", 7, 32, "replicated", [2**18] * 5),
    ]
    console = Console(record=True, width=100)
    console.print(render_plan(plans))
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "table rows dim kind ranks MB per rank" in rows
    assert "item 1,000,000 32 row_wise 0–2, 4 0.5–1" in rows
    assert "user_age 7 32 replicated 0–4 0.25" in rows
