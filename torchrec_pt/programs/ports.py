"""What goes into a program and comes out of it, and how raw features become what a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.manifest import FeatureSummary
from torchrec_pt.models.feature_encoder import module_name

Of = Literal["user", "item", "interaction"]
Named = Mapping[str, Tensor]  # name of an input -> what it was given


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        shape: numbers are fixed sizes; names are sizes that a call chooses, the same wherever the
            name stands.
        meaning: for whoever calls, with what stands where nothing is.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[str | int, ...]
    meaning: str

    def described(self) -> dict[str, Any]:
        """As JSON holds it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "name": self.name,
            "dtype": dtype,
            "shape": list(self.shape),
            "meaning": self.meaning,
        }

    def example(self, sizes: Mapping[str, int]) -> Tensor:
        """Zeros, which are items, categories and times as good as any; other sizes are 3."""
        shape = [size if isinstance(size, int) else sizes.get(size, 3) for size in self.shape]
        return torch.zeros(shape, dtype=self.dtype)


class FeatureInputs:
    """The features of users, items or interactions as inputs, as they stand in the raw data."""

    def __init__(self, dataset: PreparedDataset, of: Of) -> None:
        self.of = of
        self._read = {
            module_name(of, summary.feature.column): summary
            for summary in dataset.manifest.features
            if summary.feature.of == of and _is_read(summary)
        }

    def ports(self, *rows: str) -> list[Port]:
        """One a feature, with `rows` as their first sizes."""
        return [self._port(name, summary, rows) for name, summary in self._read.items()]

    def cells(self, named: Named) -> dict[str, Tensor]:
        """Rows of cells (N, M) or (N, width), as `Fields` read them."""
        return {
            name: _cells(summary, named[name].flatten(0, named[name].dim() - _num_own(summary) - 1))
            for name, summary in self._read.items()
        }

    def _port(self, name: str, summary: FeatureSummary, rows: tuple[str, ...]) -> Port:
        column = summary.feature.column
        if summary.feature.kind == "categorical":
            meaning = (
                f"{self.of} {column}: ids of vocabulary.parquet, 0 for a value that is not there; "
                "-1 where a row has no more values"
            )
            return Port(name, torch.int64, (*rows, f"{name}_values"), meaning)
        if summary.feature.kind == "numeric":
            meaning = f"{self.of} {column}: the number as it is, NaN where it is not known"
            return Port(name, torch.float64, rows, meaning)
        assert summary.dim is not None
        meaning = f"{self.of} {column}: the vector as it is, zeros where it is not known"
        if summary.feature.kind == "text":
            meaning = f"{self.of} {column}: what its encoder says of the text, zeros without one"
        return Port(name, torch.float32, (*rows, summary.dim), meaning)


def _is_read(summary: FeatureSummary) -> bool:
    return summary.feature.kind in ("categorical", "numeric") or summary.dim is not None


def _num_own(summary: FeatureSummary) -> int:
    """Dimensions of a cell."""
    return 0 if summary.feature.kind == "numeric" else 1


def _cells(summary: FeatureSummary, given: Tensor) -> Tensor:
    if summary.feature.kind == "categorical":
        return given
    if summary.feature.kind == "numeric":
        assert summary.mean is not None
        assert summary.std is not None
        return ((given - summary.mean) / summary.std).float().nan_to_num(0.0).unsqueeze(1)
    assert summary.scale is not None
    return given / summary.scale


def history_ports(*, with_times: bool) -> list[Port]:
    """Of the programs that read a history."""
    ports = [
        Port(
            "history",
            torch.int64,
            ("batch", "history"),
            "dense ids of the items that a user took, oldest first (with labels: of those shown to "
            "the user, too); -1 where there is none, before or after the others; the newest "
            "history_length of them are read",
        )
    ]
    if with_times:
        meaning = "when each item was taken, in the unit of the data; NaN where it is not known"
        ports.append(Port("times", torch.float64, ("batch", "history"), meaning))
    return ports


def item_port(*rows: str) -> Port:
    return Port("items", torch.int64, rows, "dense ids of items, rows of items.parquet")
