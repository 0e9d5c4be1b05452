"""Rows of label 0 are impressions: no interactions, for all but the tasks that judge pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from torchrec_pt.candidates import draw_candidates
from torchrec_pt.config import DataConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.data.manifest import notices, require_rows
from torchrec_pt.data.prepare import prepare
from torchrec_pt.distributed import Ranks
from torchrec_pt.held_out import held_out

# user, item, label, split; in time order
ROWS = [
    ("a", "x", 1, "train"),
    ("a", "y", 0, "train"),
    ("a", "z", 1, "train"),
    ("a", "y", 0, "valid"),
    ("a", "x", 1, "valid"),
    ("a", "v", 0, "test"),
    ("a", "w", 1, "test"),
    ("b", "y", 0, "train"),
    ("b", "z", 0, "train"),
    ("c", "z", 1, "train"),
    ("c", "x", 0, "valid"),
    ("d", "z", 1, "valid"),
]
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def _prepare(folder: Path, rows: list[Any], **settings: Any) -> PreparedDataset:
    lines = [f"{u},{i},{label},{split},{t}" for t, (u, i, label, split) in enumerate(rows)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,click,part,t", *lines]) + "\n")
    columns = {"label": "click", "split": "part", "timestamp": "t"}
    config = DataConfig.model_validate(
        {
            "format": "csv",
            "path": folder / "log.csv",
            "columns": columns,
            "split": {"rule": "given"},
            **settings,
        }
    )
    prepare(config, folder / "out", seed=0)
    return PreparedDataset.load(folder / "out")


@pytest.fixture
def data(tmp_path: Path) -> PreparedDataset:
    return _prepare(tmp_path, ROWS)


def _named(data: PreparedDataset, ids: torch.Tensor) -> list[str]:
    return data.items["external_id"][ids.tolist()].to_list()


def test_impressions_are_in_no_history_and_no_target(data: PreparedDataset) -> None:
    a = data.user_index("a")
    row = torch.tensor([a])
    assert _named(data, data.history("train").select(row).values) == ["x", "z"]
    assert _named(data, data.history("test").select(row).values) == ["x", "z", "x", "w"]
    assert _named(data, data.targets("valid").select(row).values) == ["x"]
    assert len(data.split) == len(ROWS)  # they stay, for ctr
    asked = held_out(data, "test")
    assert asked.users.tolist() == [a]
    assert _named(data, asked.targets.values) == ["w"]


def test_items_are_counted_and_ordered_by_how_often_they_were_taken(data: PreparedDataset) -> None:
    counts = dict(data.items.select("external_id", "count").iter_rows())
    assert counts == {"x": 1, "z": 2, "y": 0, "v": 0, "w": 0}
    assert data.items["external_id"].to_list()[:3] == ["z", "x", "y"]
    assert data.num_trained_items == 2


def test_who_was_only_shown_items_trains_where_impressions_are_asked_for(
    data: PreparedDataset,
) -> None:
    def users(with_impressions: bool) -> dict[str, int]:
        loader = HistoryLoader(
            data,
            batch_size=2,
            max_length=5,
            seed=0,
            ranks=ALONE,
            with_impressions=with_impressions,
        )
        return {
            data.users["external_id"][user]: length
            for rows in loader.steps(0)
            for user, length in zip(
                rows.users.tolist(), rows.histories.lengths.tolist(), strict=True
            )
            if user >= 0
        }

    assert users(False) == {"a": 2, "c": 1}
    assert users(True) == {"a": 2, "b": 0, "c": 1}


def test_an_item_that_was_only_shown_is_a_candidate(data: PreparedDataset) -> None:
    asked = held_out(data, "test")
    drawn, num_short = draw_candidates(data, asked, num=2, seed=0)
    assert sorted(_named(data, drawn.values)) == ["v", "y"]
    assert num_short == 0


def test_the_manifest_counts_impressions_and_says_so(data: PreparedDataset) -> None:
    manifest = data.manifest
    assert (manifest.num_impressions, manifest.num_interactions) == (6, 12)
    assert (manifest.num_taken_valid, manifest.num_taken_test) == (2, 1)
    assert manifest.num_repeats == 1  # a takes x twice; y, shown twice, repeats nothing
    assert any("6 of 12 rows have label 0" in line for line in notices(manifest))


def test_a_split_of_impressions_alone_has_nothing_to_rank(tmp_path: Path) -> None:
    data = _prepare(tmp_path, [row for row in ROWS if row[:2] != ("a", "w")])
    require_rows(data.manifest, "validation")
    with pytest.raises(DataError, match="leaves test rows of label 0 alone, and nothing to rank"):
        require_rows(data.manifest, "test")


def test_training_without_anything_taken_is_refused(tmp_path: Path) -> None:
    rows = [(user, item, 0, "train") for user, item, _, _ in ROWS]
    with pytest.raises(DataError, match="no training row has a label above 0"):
        _prepare(tmp_path, rows)
