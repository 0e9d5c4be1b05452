"""The side features of users, items and interactions as numbers that a model takes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import polars as pl
import torch
from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.manifest import FeatureSummary

Of = Literal["user", "item", "interaction"]
UNKNOWN = 0  # the vocabulary id of a value unseen in training, and of an empty cell


@dataclass(frozen=True, eq=False)
class EntityFeatures:
    """The features of all N users, items or interactions; a row is a dense id.

    Attributes:
        categorical: column -> N rows of vocabulary ids (int64), none of them empty.
        num_values: column -> size of its vocabulary, the unknown value included.
        pooling: column -> "mean" or "sum", how the values of a cell become one vector.
        dense: column -> (N, width) float32: a number in standard deviations from the training
            mean; or a vector, given or encoded from text, divided by the root mean square of
            the norms in training, so that a layer of weights of deviation 0.02 makes of it what
            a row of a table starts as. Zeros where the cell is empty.
        skipped: columns that no model reads: texts without an encoder, vectors nobody has.
    """

    of: Of
    num_rows: int
    categorical: dict[str, Jagged]
    num_values: dict[str, int]
    pooling: dict[str, str]
    dense: dict[str, Tensor]
    skipped: tuple[str, ...]

    @property
    def num_fields(self) -> int:
        """Features that a model reads."""
        return len(self.categorical) + len(self.dense)


def no_features(of: Of, num_rows: int) -> EntityFeatures:
    return EntityFeatures(of, num_rows, {}, {}, {}, {}, ())


def load_entity_features(dataset: PreparedDataset, of: Of) -> EntityFeatures:
    """What the prepared dataset knows of every user, item or interaction.

    Raises:
        DataError: a vocabulary that cannot be read.
    """
    # Without feature columns the interactions' table has no height either.
    table, num_rows = {
        "user": (dataset.users, dataset.num_users),
        "item": (dataset.items, dataset.num_items),
        "interaction": (dataset.interaction_features, len(dataset.split)),
    }[of]
    categorical: dict[str, Jagged] = {}
    num_values: dict[str, int] = {}
    pooling: dict[str, str] = {}
    dense: dict[str, Tensor] = {}
    skipped: list[str] = []
    for summary in dataset.manifest.features:
        feature, name = summary.feature, summary.feature.column
        if feature.of != of:
            continue
        if feature.kind == "categorical":
            known = dataset.vocabulary.filter((pl.col("of") == of) & (pl.col("column") == name))
            categorical[name] = _ids(table[name], known)
            num_values[name] = known.height + 1
            pooling[name] = feature.pooling
        elif feature.kind == "numeric":
            dense[name] = _standardized(table[name], summary)
        elif summary.dim is not None:  # of a vector, or of an encoded text
            assert summary.scale is not None
            vectors = (
                _vectors(table[name], summary.dim)
                if feature.kind == "vector"
                else dataset.text_vectors(summary)
            )
            dense[name] = vectors.div_(summary.scale)
        else:
            skipped.append(name)
    return EntityFeatures(of, num_rows, categorical, num_values, pooling, dense, tuple(skipped))


def _ids(cells: pl.Series, known: pl.DataFrame) -> Jagged:
    """Vocabulary ids of single or several values a cell; a cell without any is [UNKNOWN]."""
    cells = cells.rename("value")
    if cells.dtype != pl.List:
        cells = cells.reshape((-1, 1)).arr.to_list()
    lists = pl.when(cells.list.len().fill_null(0) == 0).then(pl.lit([None])).otherwise(cells)
    frame = pl.DataFrame(cells).select(lists.cast(pl.List(pl.String)).alias("value"))
    lengths = frame["value"].list.len().cast(pl.Int64)
    ids = (
        frame.explode("value")
        .join(known.select("value", "id"), on="value", how="left", maintain_order="left")["id"]
        .fill_null(UNKNOWN)
        .cast(pl.Int64)
    )
    return Jagged.from_lengths(
        torch.from_numpy(ids.to_numpy(writable=True)),
        torch.from_numpy(lengths.to_numpy(writable=True)),
    )


def _standardized(cells: pl.Series, summary: FeatureSummary) -> Tensor:
    assert summary.mean is not None
    assert summary.std is not None
    numbers = (cells.cast(pl.Float64) - summary.mean) / summary.std
    return torch.from_numpy(numbers.fill_null(0.0).to_numpy(writable=True)).float().unsqueeze(1)


def _vectors(cells: pl.Series, dim: int) -> Tensor:
    values = cells.drop_nulls().explode().to_numpy(writable=True)
    vectors = torch.zeros(len(cells), dim)
    is_given = torch.from_numpy(cells.is_not_null().to_numpy(writable=True))
    vectors[is_given] = torch.from_numpy(values).float().view(-1, dim)
    return vectors
