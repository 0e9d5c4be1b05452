"""From a checkpoint into a model that starts from it: fine-tuning, or pretraining that goes on."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from torchrec_pt.checkpoint import Checkpoint, CheckpointError
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks
from torchrec_pt.item_rows import (
    WHOLE_STATES,
    RowMatch,
    clear_new_rows,
    match_rows,
    match_values,
    per_item,
    read_rows,
)
from torchrec_pt.models.feature_encoder import module_name
from torchrec_pt.optim import Optimizers
from torchrec_pt.sharding import is_item_table


class RowCounts(NamedTuple):
    """Of the rows of a tensor, where they stand for other items or values than the checkpoint's."""

    matched: int
    new: int
    dropped: int


@dataclass(frozen=True)
class TransferReport:
    """Names of tensors: taken over, only in the model, only in the checkpoint.

    Attributes:
        sizes: numbers in each tensor; of one that is taken over, in the model.
        rows: of the parameters whose rows were matched by external id or by value.
    """

    loaded: list[str]
    new: list[str]
    dropped: list[str]
    sizes: Mapping[str, int]
    rows: Mapping[str, RowCounts]

    def __str__(self) -> str:
        """By module: "loaded 29 (backbone 29) tensors; new 14 (ctr 14); dropped 0"."""

        def count(names: list[str]) -> str:
            modules = Counter(_module_of(name) for name in names)
            listed = ", ".join(f"{module} {num}" for module, num in modules.items())
            return f"{len(names)} ({listed})" if names else "0"

        said = [
            f"loaded {count(self.loaded)} tensors",
            f"new {count(self.new)}",
            f"dropped {count(self.dropped)}",
        ]
        for name, (matched, new, dropped) in self.rows.items():
            table = _feature_table(name)
            what = "rows by external id" if table is None else f"values of {table}"
            said.append(f"{what}: {matched:,} matched, {new:,} new, {dropped:,} dropped")
        return "; ".join(dict.fromkeys(said))

    def values(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "loaded": self.loaded,
            "new": self.new,
            "dropped": self.dropped,
            "rows": {name: counts._asdict() for name, counts in self.rows.items()},
        }


def _module_of(tensor: str) -> str:
    """model.backbone.… -> backbone, model.objectives.ctr.… -> ctr, optimizer.… -> optimizer"""
    if tensor.startswith("optimizer."):
        return "optimizer"
    return tensor.removeprefix("model.").removeprefix("objectives.").split(".")[0]


@dataclass(frozen=True, eq=False)
class Numbering:
    """What the rows of a model's tables stand for.

    Attributes:
        items: external ids, row = dense item id.
        vocabulary: `of`, `column`, `value`, `id` of the values of categorical features.
    """

    items: pl.Series
    vocabulary: pl.DataFrame

    @classmethod
    def of(cls, dataset: PreparedDataset) -> Numbering:
        return cls(dataset.items["external_id"], dataset.vocabulary)

    @cached_property
    def digest(self) -> str:
        """Names the values of the categorical features and their order."""
        return hashlib.sha256(self.vocabulary.write_ndjson().encode()).hexdigest()[:16]


def load_pretrained(
    path: Path, model: DistributedModelParallel, numbering: Numbering, ranks: Ranks
) -> TransferReport:
    """Take over every tensor of the model that the checkpoint holds under the same name.

    Rows of another catalogue are matched by external id, those of categorical features by value;
    what is new starts as said in `_take_over`.

    Raises:
        CheckpointError: a name in common with another shape, or no name in common.
    """
    return _take_over(Checkpoint.open(path, ranks), model_tensors(model), ("model.",), numbering)


def continue_training(
    path: Path,
    model: DistributedModelParallel,
    optimizers: Optimizers,
    numbering: Numbering,
    ranks: Ranks,
) -> TransferReport:
    """The same with the states of the optimizers."""
    tensors = model_tensors(model) | optimizer_tensors(optimizers)
    kinds = ("model.", "optimizer.")
    return _take_over(Checkpoint.open(path, ranks), tensors, kinds, numbering)


def model_tensors(model: DistributedModelParallel) -> dict[str, Tensor]:
    """As checkpoints name them."""
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """As checkpoints name them."""
    return {f"optimizer.{name}": value for name, value in optimizers.state().items()}


# The tables of `FeatureEncoder`, and what makes features part of an item's vector.
_FEATURE_TABLE = re.compile(r"\.embedding_bags\.(.+?)\.weight(?:\.|$)")
_ITEM_CONTENT = ("model.backbone.content.", "model.backbone.item_features.")


def _feature_table(tensor: str) -> str | None:
    """The table of a feature that a parameter or its state is of."""
    found = _FEATURE_TABLE.search(tensor)
    return found[1] if found else None


def _take_over(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    kinds: tuple[str, ...],
    numbering: Numbering,
) -> TransferReport:
    """Read what the model and the checkpoint have in common.

    A new item starts as its features say, from a row of zeros, where what reads the features is
    taken over; else from its initial row. A new value of a feature starts as an unknown one. The
    optimizers' states of both start from zeros.
    """
    held = {name for name in checkpoint.tensors if name.startswith(kinds)}
    taken = held & tensors.keys()
    matches = _match_rows(checkpoint, taken, numbering)
    taken -= _of_unknown_values(checkpoint, taken, numbering)
    if not any(name.startswith("model.") for name in taken):
        raise CheckpointError(
            f"{checkpoint.path}: has no parameter in common with the model; "
            "pretrain the same backbone"
        )
    loaded, new, dropped = sorted(taken), sorted(tensors.keys() - taken), sorted(held - taken)
    by_row = {name: tensors[name] for name in loaded if name in matches}
    as_they_are = {name: tensors[name] for name in loaded if name not in matches}
    num_rows = {name: matches[name].num_saved for name in by_row}
    checkpoint.check({**as_they_are, **by_row}, num_rows)
    checkpoint.read_into(as_they_are)
    read_rows(checkpoint, by_row, matches)
    if any(name.startswith(_ITEM_CONTENT) for name in loaded):
        for name in by_row:
            if name.startswith("model.") and is_item_table(name):
                clear_new_rows(tensors[name], matches[name])
    counts = {
        name: RowCounts(match.num_matched, match.num_new, match.num_dropped)
        for name, match in matches.items()
        if name in by_row and name.startswith("model.")
    }
    sizes = {name: math.prod(tensors[name].size()) for name in tensors}
    sizes |= {name: math.prod(checkpoint.tensors[name].shape) for name in dropped}
    return TransferReport(loaded, new, dropped, sizes, counts)


def _match_rows(
    checkpoint: Checkpoint, names: Iterable[str], numbering: Numbering
) -> dict[str, RowMatch]:
    """Of the tensors whose rows stand for something else in the checkpoint: where they are there.

    Raises:
        CheckpointError: no item in common.
    """
    names = sorted(names)
    found: dict[str, RowMatch] = {}
    items = numbering.items
    if not checkpoint.is_of(items):
        match = match_rows(checkpoint.items, items)
        if not match.num_matched:
            raise CheckpointError(
                f"{checkpoint.path}: has no item in common with the data; its ids are like "
                f"{checkpoint.items[0]!r}, the data's like {items[0]!r}; use data of the same ids"
            )
        found |= dict.fromkeys(per_item(names), match)
    if checkpoint.vocabulary is None or checkpoint.state.get("vocabulary") == numbering.digest:
        return found
    for name in names:
        table = _feature_table(name)
        if table is not None and not name.endswith(WHOLE_STATES):
            saved, wanted = (
                _values(known, table) for known in (checkpoint.vocabulary, numbering.vocabulary)
            )
            match = match_values(saved, wanted)
            # A state of the unknown value is not one of the new ones.
            found[name] = match if name.startswith("model.") else replace(match, default=-1)
    return found


def _of_unknown_values(
    checkpoint: Checkpoint, names: Iterable[str], numbering: Numbering
) -> set[str]:
    """The tensors of features whose rows stand for who knows what, in an old checkpoint."""
    is_known = checkpoint.vocabulary is not None
    if is_known or checkpoint.state.get("vocabulary") == numbering.digest:
        return set()
    return {name for name in names if _feature_table(name) is not None}


def _values(vocabulary: pl.DataFrame, table: str) -> pl.Series:
    """The values of the feature that a table is of, in the order of its rows from 1 on."""
    for (of, column), rows in vocabulary.group_by("of", "column"):
        if module_name(str(of), str(column)) == table:
            return rows.sort("id")["value"]
    return pl.Series([], dtype=pl.String)  # nobody had a value
