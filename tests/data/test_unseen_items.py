"""Items that stand in the item file and in no interaction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from torchrec_pt.config import DataConfig
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import Manifest
from torchrec_pt.data.prepare import prepare

# Item 30 has low ratings alone.
LOG = [(1, 10, 5, 1), (1, 20, 5, 2), (2, 10, 4, 1), (2, 20, 4, 2), (2, 30, 1, 3)]
FILE = {50: "z", 20: "y", 40: "x y", 30: "y", 10: "x"}


def _prepare(folder: Path, out: str, **data: Any) -> tuple[Manifest, dict[str, pl.DataFrame]]:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    lines = [header, *("\t".join(map(str, row)) for row in LOG)]
    (folder / "log.inter").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\ttags:token_seq", *(f"{item}\t{tags}" for item, tags in FILE.items())]
    (folder / "log.item").write_text("\n".join(lines) + "\n")
    raw = {
        "format": "recbole",
        "path": folder / "log.inter",
        "columns": {"rating": "rating", "timestamp": "timestamp"},
        "features": [{"column": "tags", "of": "item", "kind": "categorical"}],
        **data,
    }
    manifest = prepare(DataConfig.model_validate(raw), folder / out, 0)
    return manifest, {name: pl.read_parquet(folder / out / name) for name in manifest.files}


def test_they_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    manifest, tables = _prepare(tmp_path, "out")
    assert manifest.num_items == 3
    assert tables["items.parquet"]["external_id"].to_list() == [10, 20, 30]


def test_they_come_last_and_nothing_else_changes(tmp_path: Path) -> None:
    _, without = _prepare(tmp_path, "without")
    manifest, tables = _prepare(tmp_path, "out", keep_unseen_items=True)
    assert manifest.num_items == 5
    items = tables.pop("items.parquet")
    assert items.head(3).equals(without.pop("items.parquet"))
    assert items.tail(2).rows() == [(50, 0, ["z"]), (40, 0, ["x", "y"])]
    assert tables.keys() == without.keys()
    assert all(table.equals(without[name]) for name, table in tables.items())


def test_items_whose_interactions_the_filters_took_are_kept_too(tmp_path: Path) -> None:
    filters = {"min_rating": 3}
    _, tables = _prepare(tmp_path, "out", keep_unseen_items=True, filters=filters)
    assert tables["items.parquet"]["external_id"].to_list() == [10, 20, 50, 40, 30]


@pytest.mark.parametrize("data", [{"features": []}, {"format": "tsv"}])
def test_without_an_item_file_they_are_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    if data.get("format") == "tsv":
        log = tmp_path / "log.tsv"
        log.write_text("user_id\titem_id\ttags\n1\t10\tx\n")
        features = [{"column": "tags", "of": "item", "kind": "categorical"}]
        data = {"format": "tsv", "path": log, "columns": {}, "features": features}
    with pytest.raises(DataError, match="keep_unseen_items: needs a file of items"):
        _prepare(tmp_path, "out", keep_unseen_items=True, **data)
