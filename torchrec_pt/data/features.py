"""Features of users, items and interactions: types, vocabularies, statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping

import polars as pl

from torchrec_pt.config import Feature
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import FeatureSummary

_NO_VOCABULARY = pl.DataFrame(
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


def describe_features(
    features: tuple[Feature, ...],
    tables: Mapping[str, pl.DataFrame],
    in_training: Mapping[str, pl.Series],
) -> tuple[dict[str, pl.DataFrame], tuple[FeatureSummary, ...], pl.DataFrame]:
    """Bring features to their types and describe those of training.

    Args:
        tables: by what a feature is of: "user", "item", "interaction".
        in_training: which rows of each table statistics and vocabularies may see.
    Returns:
        The tables, the summaries, and all vocabularies as (of, column, value, id).
    Raises:
        DataError: vectors that are not numbers or not of one length.
    """
    typed = dict(tables)
    summaries: list[FeatureSummary] = []
    vocabularies = [_NO_VOCABULARY]
    for feature in features:
        table = typed[feature.of] = _typed_feature(typed[feature.of], feature)
        seen = table.filter(in_training[feature.of])[feature.column].drop_nulls()
        vocabulary = _vocabulary(seen, feature) if feature.kind == "categorical" else None
        if vocabulary is not None:
            vocabularies.append(vocabulary)
        summaries.append(_summarize(seen, feature, table, vocabulary))
    return typed, tuple(summaries), pl.concat(vocabularies)


def _typed_feature(table: pl.DataFrame, feature: Feature) -> pl.DataFrame:
    """Bring a feature column to the type of its kind; cells stay null where nothing is given."""
    cell, dtype = pl.col(feature.column), table.schema[feature.column]
    where = f"data.features: {feature.of} {feature.column}"
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
                raise DataError(f"{where}: a vector is several numbers; set its separator")
            numbers = cell.list.eval(
                pl.element().str.strip_chars() if dtype == pl.String else pl.element()
            )
            cell = numbers.cast(pl.List(pl.Float32), strict=False)
    table = table.with_columns(cell.alias(feature.column))
    if feature.kind == "vector":
        _check_vectors(table[feature.column].drop_nulls(), where)
    return table


def _check_vectors(vectors: pl.Series, where: str) -> None:
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
    seen: pl.Series, feature: Feature, table: pl.DataFrame, vocabulary: pl.DataFrame | None
) -> FeatureSummary:
    if feature.kind == "numeric":
        values = seen.cast(pl.Float64)
        mean = float(values.mean() or 0.0)  # type: ignore[arg-type]
        std = float(values.std(ddof=0) or 1.0)  # type: ignore[arg-type]
        return FeatureSummary(feature=feature, mean=mean, std=std)
    if feature.kind == "vector":
        vectors = table[feature.column].drop_nulls()
        dim = len(vectors[0]) if len(vectors) else None
        return FeatureSummary(feature=feature, dim=dim, scale=_scale(seen))
    if vocabulary is not None:
        return FeatureSummary(feature=feature, num_values=vocabulary.height + 1)
    return FeatureSummary(feature=feature)


def _scale(vectors: pl.Series) -> float:
    """Root mean square of their norms; 1 where that is none or 0."""
    squares = vectors.explode().cast(pl.Float64).pow(2).sum()
    return math.sqrt(squares / len(vectors)) if squares else 1.0
