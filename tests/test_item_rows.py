"""Rows follow their items' external ids from one catalogue to another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import FEATURES, tiny_config
from torchrec_pt import checkpoint
from torchrec_pt.build import build_learner, build_task
from torchrec_pt.checkpoint import Checkpoint, CheckpointError
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.item_rows import match_rows, per_item
from torchrec_pt.optim import Optimizers
from torchrec_pt.saver import Saver
from torchrec_pt.transfer import (
    Numbering,
    _take_over,
    load_pretrained,
    model_tensors,
    optimizer_tensors,
)

TABLE = "model.backbone.items.collection.embeddings.item.weight"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _colours(*values: str) -> pl.DataFrame:
    """The vocabulary of the items' colours, from 1 on."""
    rows = {"of": "item", "column": "colour", "value": list(values)}
    ids = pl.int_range(1, len(values) + 1, dtype=pl.Int32, eager=True)
    return pl.DataFrame(rows, schema=["of", "column", "value"]).with_columns(id=ids)


NO_COLOURS = _colours()


def _save(
    folder: Path,
    tensors: dict[str, Tensor],
    ids: pl.Series,
    ranks: Ranks,
    vocabulary: pl.DataFrame = NO_COLOURS,
    *,
    is_old: bool = False,
) -> Path:
    """`is_old`: as checkpoints were before they held the vocabulary."""
    kept = None if is_old else vocabulary
    with Saver(folder, ids, ranks, keep_last=1, in_background=False, vocabulary=kept) as saver:
        saver.save(1, tensors, {"vocabulary": Numbering(ids, vocabulary).digest}, best_step=1)
    return folder / "step-00000001"


class _Stub(nn.Module):
    """Has the tensors of a model, under their names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = {name.removeprefix("model."): value for name, value in tensors.items()}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return self.tensors


def _load(
    path: Path,
    tensors: dict[str, Tensor],
    ids: pl.Series,
    ranks: Ranks,
    vocabulary: pl.DataFrame = NO_COLOURS,
) -> str:
    model: Any = _Stub(tensors)
    return str(load_pretrained(path, model, Numbering(ids, vocabulary), ranks))


def _table(num: int, dim: int = 3) -> Tensor:
    return torch.arange(1.0, num + 1).unsqueeze(1).expand(num, dim).contiguous()


@pytest.mark.parametrize("block_bytes", [1, 30, checkpoint.BLOCK_BYTES])
def test_rows_move_with_their_ids_in_blocks_of_any_size(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    path = _save(tmp_path, {TABLE: _table(5)}, pl.Series(["a", "b", "c", "d", "e"]), ranks)
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    target = torch.full((6, 3), -1.0)
    said = _load(path, {TABLE: target}, pl.Series(["e", "x", "b", "a", "y", "d"]), ranks)
    assert target[:, 0].tolist() == [5, -1, 2, 1, -1, 4]
    assert said.endswith("rows by external id: 4 matched, 2 new, 1 dropped")


def test_a_catalogue_of_the_same_size_in_another_order_is_not_taken_for_the_same(
    tmp_path: Path, ranks: Ranks
) -> None:
    path = _save(tmp_path, {TABLE: _table(3)}, pl.Series([10, 20, 30]), ranks)
    target = torch.zeros(3, 3)
    _load(path, {TABLE: target}, pl.Series([30, 10, 20]), ranks)
    assert target[:, 0].tolist() == [3, 1, 2]


def test_ids_that_became_texts_are_the_same_ids(tmp_path: Path, ranks: Ranks) -> None:
    path = _save(tmp_path, {TABLE: _table(3)}, pl.Series([10, 20, 30]), ranks)
    same = pl.Series(["10", "20", "30"])
    assert Checkpoint.open(path, ranks).is_of(same)
    assert match_rows(pl.Series([10, 20]), pl.Series(["20", "020"])).source.tolist() == [1, -1]


def test_only_named_tensors_are_matched_by_item(tmp_path: Path, ranks: Ranks) -> None:
    """One with as many rows by accident is none of them, and must have its own shape."""
    tensors = {TABLE: _table(4), "model.backbone.position.weight": _table(4)}
    path = _save(tmp_path, tensors, pl.Series(["a", "b", "c", "d"]), ranks)
    other = pl.Series(["d", "c", "b", "a"])
    target = {name: torch.zeros(4, 3) for name in tensors}
    _load(path, target, other, ranks)
    assert target[TABLE][:, 0].tolist() == [4, 3, 2, 1]
    assert target["model.backbone.position.weight"][:, 0].tolist() == [1, 2, 3, 4]


def test_what_does_not_fit_changes_nothing(tmp_path: Path, ranks: Ranks) -> None:
    tensors = {TABLE: _table(3), "model.backbone.a": torch.ones(2)}
    path = _save(tmp_path, tensors, pl.Series(["a", "b", "c"]), ranks)
    other = pl.Series(["c", "b", "x", "y"])
    for table, small, said in [
        (torch.zeros(4, 2), torch.zeros(2), "is (3, 3), the model wants (4, 2)"),
        (torch.zeros(4, 3).half(), torch.zeros(2), "the model wants torch.float16"),
        (torch.zeros(4, 3), torch.zeros(3), "is (2,), the model wants (3,)"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            _load(path, {TABLE: table, "model.backbone.a": small}, other, ranks)
        assert said in str(caught.value)
        assert not table.any()
        assert not small.any()
    with pytest.raises(CheckpointError, match="has no item in common with the data; its ids are"):
        _load(path, {TABLE: torch.zeros(1, 3)}, pl.Series(["z"]), ranks)


COLOUR = "model.backbone.item_features.tables.embedding_bags.item_colour.weight"


def test_rows_of_categories_move_with_their_values_and_new_ones_start_as_the_unknown(
    tmp_path: Path, ranks: Ranks
) -> None:
    ids = pl.Series(["a", "b", "c"])
    saved = {TABLE: _table(3), COLOUR: _table(4)}
    path = _save(tmp_path, saved, ids, ranks, _colours("red", "blue", "green"))
    target = {TABLE: torch.zeros(3, 3), COLOUR: torch.full((5, 3), -1.0)}
    wanted = _colours("blue", "pink", "red", "grey")
    said = _load(path, target, ids, ranks, wanted)
    assert target[COLOUR][:, 0].tolist() == [1, 3, 1, 2, 1]  # unknown, blue, pink, red, grey
    assert said.endswith("values of item_colour: 3 matched, 2 new, 1 dropped")
    assert target[TABLE][:, 0].tolist() == [1, 2, 3]


def test_the_state_of_a_new_category_is_not_that_of_the_unknown_one(
    tmp_path: Path, ranks: Ranks
) -> None:
    ids = pl.Series(["a", "b", "c"])
    state = COLOUR.replace("model.", "optimizer.") + ".exp_avg"
    step = COLOUR.replace("model.", "optimizer.") + ".step"
    tensors = {TABLE: _table(3), COLOUR: _table(2), state: _table(2), step: torch.tensor(7.0)}
    path = _save(tmp_path, tensors, ids, ranks, _colours("red"))
    target = {name: torch.zeros(3, 3) for name in (TABLE, COLOUR, state)}
    target[step] = torch.tensor(0.0)
    opened = Checkpoint.open(path, ranks)
    kinds = ("model.", "optimizer.")
    _take_over(opened, target, kinds, Numbering(ids, _colours("blue", "red")))
    assert target[state][:, 0].tolist() == [1, 0, 2]
    assert target[step] == 7


def test_values_of_an_old_checkpoint_are_known_only_where_they_are_numbered_alike(
    tmp_path: Path, ranks: Ranks
) -> None:
    ids = pl.Series(["a", "b", "c"])
    for colours, taken in ((("red", "blue"), True), (("blue", "red"), False)):
        saved = {TABLE: _table(3), COLOUR: _table(3)}
        path = _save(tmp_path, saved, ids, ranks, _colours("red", "blue"), is_old=True)
        target = {TABLE: torch.zeros(3, 3), COLOUR: torch.zeros(3, 3)}
        said = _load(path, target, ids, ranks, _colours(*colours))
        assert bool(target[COLOUR].any()) == taken
        assert target[TABLE].any()
        assert ("new 0; dropped 0" in said) == taken
        assert ("new 1 (backbone 1); dropped 1 (backbone 1)" in said) == (not taken)


def test_new_items_start_from_their_content_where_that_is_taken_over(
    tmp_path: Path, ranks: Ranks
) -> None:
    content = "model.backbone.content.features.layers.item_price.weight"
    path = _save(tmp_path, {TABLE: _table(2), content: _table(3)}, pl.Series(["a", "b"]), ranks)
    for held, start in (({content: torch.zeros(3, 3)}, 0), ({}, -1)):
        target = {TABLE: torch.full((3, 3), -1.0), **held}
        _load(path, target, pl.Series(["b", "x", "a"]), ranks)
        assert target[TABLE][:, 0].tolist() == [2, start, 1]


@pytest.mark.parametrize("backbone", ["transformer", "two_tower", "autoencoder"])
def test_every_tensor_of_a_model_that_has_one_row_an_item_is_named(
    cycle_folder: Path, cycle_with_features: PreparedDataset, ranks: Ranks, backbone: str
) -> None:
    """The catalogue has 30 items; nothing else here has 30 rows."""
    model = {"backbone": backbone, "dim": 16, "max_length": 8}
    task = {"ctr": {"positive_rating": 3, "hidden_dims": [8]}}
    config = tiny_config(cycle_folder, FEATURES, model=model, finetune=task)
    train = config.finetune.tasks["ctr"]
    objectives = [build_task(config, "ctr", cycle_with_features)]
    built = build_learner(config, train, objectives, cycle_with_features, ranks)
    optimizers = Optimizers(built.model, train, built.placement, 10)
    tensors = model_tensors(built.model) | optimizer_tensors(optimizers)
    with_30_rows = {name for name, tensor in tensors.items() if tensor.shape[:1] == (30,)}
    assert set(per_item(tensors)) == with_30_rows
    assert len(with_30_rows) == 6  # table and biases, with two moments each
