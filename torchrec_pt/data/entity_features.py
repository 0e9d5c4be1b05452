"""The side features of users, items and interactions as numbers that a model takes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from torchrec_pt.config import Feature
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.features import typed_feature
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.manifest import FeatureSummary
from torchrec_pt.data.text_encoder import find_encoders, load_encoder

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
    return _read(dataset, of, table, num_rows, dataset.text_vectors)


def new_item_features(
    dataset: PreparedDataset, items: Sequence[Mapping[str, Any]]
) -> EntityFeatures:
    """Of items that the dataset does not hold, by what is said of them.

    Args:
        items: column -> value of each, as in the raw data; what is not said is unknown.
    Raises:
        DataError: a column that is no item feature, a value of another type, or a text whose
            encoder is not here.
    """
    features = [s.feature for s in dataset.manifest.features if s.feature.of == "item"]
    known = [feature.column for feature in features]
    for name in dict.fromkeys(name for item in items for name in item):
        if name not in known:
            raise DataError(
                f'features: the model knows no item feature "{name}"; use some of '
                f"{', '.join(known) or 'none'}"
            )
    table = pl.DataFrame([_typed(feature, items) for feature in features])

    def encoded(summary: FeatureSummary) -> Tensor:
        (encoder,) = find_encoders([summary.feature])
        if encoder.sha256 != summary.encoder_sha256:
            raise DataError(
                f"{encoder.where}: {encoder.folder} is another encoder than the one the data was "
                "prepared with; put that one there"
            )
        texts = table[summary.feature.column].fill_null("")
        vectors = torch.from_numpy(load_encoder(encoder)(texts.to_list()))
        vectors[torch.from_numpy((texts.str.strip_chars() == "").to_numpy(writable=True))] = 0
        return vectors

    return _read(dataset, "item", table, len(items), encoded)


def _typed(feature: Feature, items: Sequence[Mapping[str, Any]]) -> pl.Series:
    """What the items say of a feature, of the type that `prepare` gives its column."""
    try:
        column = pl.Series(feature.column, [item.get(feature.column) for item in items])
        typed = typed_feature(column.to_frame(), feature)[feature.column]
        return typed.cast(pl.Float64) if feature.kind == "numeric" else typed
    except (pl.exceptions.PolarsError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"features: {feature.column} must be values of one type, as in the raw data "
            f"({feature.kind}), {reason}; mend them"
        ) from None


def _read(
    dataset: PreparedDataset,
    of: Of,
    table: pl.DataFrame,
    num_rows: int,
    text_vectors: Callable[[FeatureSummary], Tensor],
) -> EntityFeatures:
    """Args:
    table: typed as in `prepare`.
    text_vectors: (num_rows, dim) of an encoded text.
    """
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
                else text_vectors(summary)
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
    odd = cells.drop_nulls().list.len().filter(cells.drop_nulls().list.len() != dim)
    if len(odd):
        raise DataError(
            f"features: vectors of {cells.name} have {dim} numbers, given {odd[0]}; mend them"
        )
    values = cells.drop_nulls().explode().to_numpy(writable=True)
    vectors = torch.zeros(len(cells), dim)
    is_given = torch.from_numpy(cells.is_not_null().to_numpy(writable=True))
    vectors[is_given] = torch.from_numpy(values).float().view(-1, dim)
    return vectors
