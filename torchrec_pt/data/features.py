"""Features of users, items and interactions: types, vocabularies, statistics."""

from __future__ import annotations

import math

import polars as pl

from torchrec_pt.config import Feature
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import FeatureSummary

NO_VOCABULARY = pl.DataFrame(
    schema={"of": pl.String, "column": pl.String, "value": pl.String, "id": pl.Int32}
)


def join_features(entities: pl.DataFrame, features: pl.LazyFrame | None) -> pl.DataFrame:
    """Put the columns of `RawData.users` or `.items` beside the entities, by their common key."""
    if features is None:
        return entities
    key = "row" if "row" in features.collect_schema() else "external_id"
    wanted = features.join(entities.lazy().select(key), on=key, how="semi")
    return entities.join(
        wanted.collect(engine="streaming"), on=key, how="left", maintain_order="left"
    )


def describe_feature(
    feature: Feature, column: pl.Series, in_training: pl.Series
) -> tuple[FeatureSummary, pl.DataFrame]:
    """What training says about a feature, and its vocabulary (of, column, value, id), or none.

    Args:
        column: as `typed_feature` leaves it.
        in_training: which rows of it statistics and vocabularies may see.
    Raises:
        DataError: vectors that are not numbers or not of one length.
    """
    if feature.kind == "vector":
        _check_vectors(column.drop_nulls(), feature)
    seen = column.filter(in_training).drop_nulls()
    vocabulary = _vocabulary(seen, feature) if feature.kind == "categorical" else NO_VOCABULARY
    return _summarize(seen, feature, column, vocabulary), vocabulary


def typed_feature(table: pl.DataFrame, feature: Feature) -> pl.DataFrame:
    """Bring a feature column to the type of its kind; cells stay null where nothing is given."""
    cell, dtype = pl.col(feature.column), table.schema[feature.column]
    many = isinstance(dtype, pl.List | pl.Array)
    if feature.kind != "vector" and many:
        cell = cell.cast(pl.List(pl.String))
    elif feature.kind != "numeric" and not many:
        cell = cell.cast(pl.String)
    match feature.kind:
        case "categorical" if feature.separator and not many:
            cell = cell.str.split(feature.separator)
        case "text" if many:
            cell = cell.list.join(" ")
        case "vector":
            if feature.separator and not many:
                cell, many = cell.str.split(feature.separator), True
            if not many:
                raise DataError(
                    f"{_where(feature)}: a vector is several numbers; set its separator"
                )
            numbers = cell.list.eval(
                pl.element().str.strip_chars() if dtype == pl.String else pl.element()
            )
            cell = numbers.cast(pl.List(pl.Float32), strict=False)
    return table.with_columns(cell.alias(feature.column))


def _check_vectors(vectors: pl.Series, feature: Feature) -> None:
    where = _where(feature)
    lengths = vectors.list.len().unique().sort()
    if len(lengths) > 1:
        raise DataError(
            f"{where}: vectors must be of one length, found {lengths[0]} and {lengths[-1]}; "
            "mend the column"
        )
    elements = vectors.explode()
    if not elements.is_finite().fill_null(False).all():
        raise DataError(f"{where}: vectors must hold finite numbers; mend the column")


def _vocabulary(seen: pl.Series, feature: Feature) -> pl.DataFrame:
    """Categories from the most frequent on, ties in the order of the alphabet; ids from 1."""
    values = (seen.explode() if seen.dtype == pl.List else seen).drop_nulls().alias("value")
    return (
        values.value_counts()
        .sort("count", "value", descending=[True, False])
        .with_row_index("id", offset=1)
        .select(
            pl.lit(feature.of).alias("of"),
            pl.lit(feature.column).alias("column"),
            "value",
            pl.col("id").cast(pl.Int32),
        )
    )


def _summarize(
    seen: pl.Series, feature: Feature, column: pl.Series, vocabulary: pl.DataFrame
) -> FeatureSummary:
    if feature.kind == "numeric":
        values = seen.cast(pl.Float64).rechunk()  # a sum over chunks is rounded otherwise
        mean = float(values.mean() or 0.0)  # type: ignore[arg-type]
        std = float(values.std(ddof=0) or 1.0)  # type: ignore[arg-type]
        return FeatureSummary(feature=feature, mean=mean, std=std)
    if feature.kind == "vector":
        vectors = column.drop_nulls()
        dim = len(vectors[0]) if len(vectors) else None
        return FeatureSummary(feature=feature, dim=dim, scale=_scale(seen))
    if feature.kind == "categorical":
        return FeatureSummary(feature=feature, num_values=vocabulary.height + 1)
    return FeatureSummary(feature=feature)


def _scale(vectors: pl.Series) -> float:
    """Root mean square of their norms; 1 where that is none or 0."""
    squares = vectors.explode().rechunk().cast(pl.Float64).pow(2).sum()
    return math.sqrt(squares / len(vectors)) if squares else 1.0


def _where(feature: Feature) -> str:
    return f"data.features: {feature.of} {feature.column}"
