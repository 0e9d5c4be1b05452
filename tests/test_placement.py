"""Placements and optimizers are settled as promised, and name a stage by what it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.conftest import tiny_config
from torchrec_pt.config import TableConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.models.item_table import ItemTable
from torchrec_pt.placement import Placement, settle_placement
from torchrec_pt.runs import stage_fingerprint
from torchrec_pt.sharding import shard

BIG, SMALL, DIM = 10_000_000, 100, 64


def _settle(num_items: int = SMALL, device_type: str = "cpu", **table: Any) -> Placement:
    return settle_placement(TableConfig(**table), num_items, DIM, device_type)


@pytest.mark.parametrize(
    ("num_items", "table", "kind", "optimizer"),
    [
        (SMALL, {}, "replicated", "adamw"),
        (BIG, {}, "row_wise", "rowwise_adagrad"),
        (BIG, {"replicated_max_mb": 10_000}, "replicated", "adamw"),
        (SMALL, {"optimizer": "adagrad"}, "row_wise", "adagrad"),
        (SMALL, {"optimizer": "adamw"}, "replicated", "adamw"),
        (SMALL, {"placement": "replicated", "optimizer": "sgd"}, "replicated", "sgd"),
        (SMALL, {"placement": "table_wise"}, "table_wise", "rowwise_adagrad"),
        (SMALL, {"placement": "planner"}, "planner", "rowwise_adagrad"),
        (SMALL, {"placement": "column_wise", "optimizer": "sgd"}, "column_wise", "sgd"),
    ],
)
def test_auto_is_resolved(num_items: int, table: dict[str, Any], kind: str, optimizer: str) -> None:
    settled = _settle(num_items, **table)
    assert (settled.kind, settled.optimizer) == (kind, optimizer)
    assert settled.fused == (None if kind == "replicated" else optimizer)


def test_the_planner_splits_no_rows_under_an_optimizer_with_one_state_a_row() -> None:
    assert _settle(placement="planner").sharding_types == ["table_wise", "row_wise"]
    adagrad = _settle(placement="planner", optimizer="adagrad")
    assert adagrad.sharding_types == ["table_wise", "row_wise", "column_wise"]
    assert _settle(placement="row_wise").sharding_types == ["row_wise"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"placement": "row_wise", "optimizer": "adamw"}, 'set optimizer to "rowwise_adagrad", or'),
        ({"placement": "planner", "optimizer": "adamw"}, "a sharded table fuses its optimizer"),
        ({"placement": "column_wise"}, 'under column_wise; set optimizer to "adagrad" or "sgd"'),
        ({"placement": "grid"}, 'grid is for CUDA alone, this is cpu; set placement to "column'),
        ({"placement": "table_row_wise"}, 'this is cpu; set placement to "row_wise", or to "pl'),
    ],
)
def test_what_cannot_be_trained_is_refused_by_one_line(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.item_table: ") as caught:
        _settle(**table)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kinds_of_pooled_tables_are_settled_on_cuda() -> None:
    by_rows = _settle(device_type="cuda", placement="table_row_wise")
    assert (by_rows.optimizer, by_rows.sharding_types) == ("rowwise_adagrad", ["table_row_wise"])
    grid = _settle(device_type="cuda", placement="grid", optimizer="adagrad")
    assert (grid.fused, grid.sharding_types) == ("adagrad", ["grid_shard"])
    with pytest.raises(ValueError, match='under grid; set optimizer to "adagrad" or "sgd"'):
        _settle(device_type="cuda", placement="grid")


def test_a_table_without_room_is_refused_by_one_line() -> None:
    table = nn.Sequential(ItemTable(2**31, DIM))  # 512 GB, on the meta device
    with (
        joined_ranks() as ranks,
        pytest.raises(ValueError, match=r"^model\.item_table: ") as caught,
    ):
        shard(table, _settle(placement="table_wise"), TrainConfig(), ranks)
    assert "finds no room for it (insufficient_storage); use more ranks" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- fingerprints -------------------------------------------------------------------------------


def _fingerprint(dataset: PreparedDataset, rate: float = 0.01, **table: Any) -> str:
    model = {"dim": 16, "item_table": table}
    pretrain = {"learning_rate": rate, "objectives": [{"name": "masked_item"}]}
    config = tiny_config(Path(), model=model, pretrain=pretrain)
    assert config.pretrain is not None
    return stage_fingerprint(config, dataset, config.pretrain, None)


def test_a_stage_goes_on_under_another_placement(cycle: PreparedDataset) -> None:
    kinds = (
        "replicated",
        "table_wise",
        "row_wise",
        "column_wise",
        "planner",
        "table_row_wise",
        "grid",
    )
    found = {_fingerprint(cycle, placement=kind, optimizer="adagrad") for kind in kinds}
    assert len(found | {_fingerprint(cycle, optimizer="adagrad", replicated_max_mb=1e-6)}) == 1
    # What `auto` comes to is what counts.
    assert _fingerprint(cycle) == _fingerprint(cycle, placement="replicated", optimizer="adamw")
    assert _fingerprint(cycle, learning_rate=0.01) == _fingerprint(cycle)


def test_a_stage_does_not_go_on_under_another_optimizer_or_rate(cycle: PreparedDataset) -> None:
    tables: list[dict[str, Any]] = [
        {},
        {"optimizer": "sgd"},
        {"optimizer": "adagrad"},
        {"placement": "row_wise"},  # rowwise_adagrad
        {"learning_rate": 0.5},
    ]
    assert len({_fingerprint(cycle, **table) for table in tables}) == len(tables)
    assert _fingerprint(cycle, rate=0.02, learning_rate=0.5) != _fingerprint(
        cycle, learning_rate=0.5
    )
