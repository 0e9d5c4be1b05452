"""From a checkpoint into a model that starts from it: fine-tuning, or pretraining that goes on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from torchrec_pt.checkpoint import Checkpoint, CheckpointError
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks
from torchrec_pt.item_rows import match_rows, per_item, read_rows
from torchrec_pt.optim import Optimizers


@dataclass(frozen=True)
class TransferReport:
    """Names of tensors: taken over, only in the model, only in the checkpoint.

    Attributes:
        rows: items matched, new, dropped, where the catalogues differ.
    """

    loaded: list[str]
    new: list[str]
    dropped: list[str]
    rows: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        """By module: "loaded 29 (backbone 29) tensors; new 14 (ctr 14); dropped 0"."""

        def count(names: list[str]) -> str:
            modules = Counter(_module_of(name) for name in names)
            listed = ", ".join(f"{module} {num}" for module, num in modules.items())
            return f"{len(names)} ({listed})" if names else "0"

        said = (
            f"loaded {count(self.loaded)} tensors; new {count(self.new)}; "
            f"dropped {count(self.dropped)}"
        )
        if self.rows is not None:
            matched, new, dropped = self.rows
            said += f"; rows by external id: {matched:,} matched, {new:,} new, {dropped:,} dropped"
        return said

    def values(self) -> dict[str, Any]:
        """As JSON holds it."""
        lists: dict[str, Any] = {"loaded": self.loaded, "new": self.new, "dropped": self.dropped}
        if self.rows is not None:
            lists["rows"] = dict(zip(("matched", "new", "dropped"), self.rows, strict=True))
        return lists


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
        vocabulary: names the values of the categorical features and their order.
    """

    items: pl.Series
    vocabulary: str

    @classmethod
    def of(cls, dataset: PreparedDataset) -> Numbering:
        digest = hashlib.sha256(dataset.vocabulary.write_ndjson().encode()).hexdigest()[:16]
        return cls(dataset.items["external_id"], digest)


def load_pretrained(
    path: Path, model: DistributedModelParallel, numbering: Numbering, ranks: Ranks
) -> TransferReport:
    """Take over every tensor of the model that the checkpoint holds under the same name.

    Rows of another catalogue are matched by external id. Tables of categorical features are left
    as they are where their values were numbered otherwise.

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


_FEATURE_TABLES = ".embedding_bags."  # of `FeatureEncoder`, in the names of their tensors


def _take_over(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    kinds: tuple[str, ...],
    numbering: Numbering,
) -> TransferReport:
    items = numbering.items
    held = {name for name in checkpoint.tensors if name.startswith(kinds)}
    taken = held & tensors.keys()
    if checkpoint.state.get("vocabulary") != numbering.vocabulary:
        taken = {name for name in taken if _FEATURE_TABLES not in name}
    if not any(name.startswith("model.") for name in taken):
        raise CheckpointError(
            f"{checkpoint.path}: has no parameter in common with the model; "
            "pretrain the same backbone"
        )
    loaded, new, dropped = sorted(taken), sorted(tensors.keys() - taken), sorted(held - taken)
    common = {name: tensors[name] for name in loaded}
    if checkpoint.is_of(items):
        checkpoint.load(common, items)
        return TransferReport(loaded, new, dropped)
    match = match_rows(checkpoint.items, items)
    if not match.num_matched:
        raise CheckpointError(
            f"{checkpoint.path}: has no item in common with the data; its ids are like "
            f"{checkpoint.items[0]!r}, the data's like {items[0]!r}; use data of the same ids"
        )
    by_row = {name: common.pop(name) for name in per_item(loaded)}
    checkpoint.check({**common, **by_row}, list(by_row))
    checkpoint.read_into(common)
    read_rows(checkpoint, by_row, match)
    rows = (match.num_matched, match.num_new, match.num_dropped)
    return TransferReport(loaded, new, dropped, rows)
