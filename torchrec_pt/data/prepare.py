"""Raw interactions -> the prepared dataset: filtered, split, renumbered, and written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from torchrec_pt.config import (
    DataConfig,
    Feature,
    Filters,
    GivenSplit,
    LeaveOneOutSplit,
    RatioSplit,
    Split,
    TemporalSplit,
)
from torchrec_pt.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DataError,
    Dropped,
    FeatureSummary,
    Manifest,
    Source,
    load_manifest,
)
from torchrec_pt.data.readers import RawData, find_sources, read_raw, reading

TRAIN, VALID, TEST = 0, 1, 2

_NO_VOCABULARY = pl.DataFrame(
    schema={"of": pl.String, "column": pl.String, "value": pl.String, "id": pl.Int32}
)


def prepare(config: DataConfig, out: Path, seed: int) -> Manifest:
    """Write the prepared dataset of a `data` section into the folder `out`.

    The folder appears whole or not at all, with manifest.json and
        users.parquet         row = dense user id (order of first appearance in the raw files);
                              external_id, features
        items.parquet         row = dense item id (descending training count, then first
                              appearance); external_id, count (training only), features
        interactions.parquet  user, item (dense, Int32), timestamp, rating, label, split (Int8:
                              0 train, 1 valid, 2 test), features; sorted by user, then time,
                              then place in the raw files
        vocabulary.parquet    of, column, value, id: the categories seen in training; 0 = unknown
    Numeric features are Float32, categorical ones String or List(String), vectors List(Float32).

    A dataset made there from the same config, seed, format version and raw files is kept as it is;
    any other prepared dataset is replaced.

    Args:
        seed: of a random split.
    Raises:
        DataError: bad raw data, nothing left to train on, `out` is something else, a full disk.
    """
    out = Path(out)
    sources = tuple(_describe(path) for path in find_sources(config).files)
    fingerprint = _fingerprint(config, seed, sources)
    existing = _existing(out)
    if existing and existing.fingerprint == fingerprint:
        return existing

    tables, summaries, dropped = _build_tables(config, read_raw(config), seed)
    with _whole_or_nothing(out) as folder:
        for name, table in tables.items():
            table.write_parquet(folder / name)
        split = tables["interactions.parquet"]["split"]
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=fingerprint,
            seed=seed,
            columns=config.columns,
            features=summaries,
            num_users=tables["users.parquet"].height,
            num_items=tables["items.parquet"].height,
            num_interactions=split.len(),
            num_train=int((split == TRAIN).sum()),
            num_valid=int((split == VALID).sum()),
            num_test=int((split == TEST).sum()),
            split=config.split,
            filters=config.filters,
            dropped=dropped,
            sources=sources,
            files={name: (folder / name).stat().st_size for name in tables},
        )
        (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    return manifest


def _build_tables(
    config: DataConfig, raw: RawData, seed: int
) -> tuple[dict[str, pl.DataFrame], tuple[FeatureSummary, ...], Dropped]:
    """The content of each parquet file, by name."""
    with reading(config.path):
        interactions = raw.interactions.collect(engine="streaming")
    interactions, dropped = _filter(interactions, config.filters)
    interactions = _split(interactions, config.split, seed)
    interactions, users, items = _renumber(interactions)
    with reading(config.path):
        users, items = _with_features(users, raw.users), _with_features(items, raw.items)

    training = interactions.filter(pl.col("split") == TRAIN)
    # Statistics and vocabularies see these rows only: nothing of valid or test.
    dense_users = pl.int_range(users.height, dtype=pl.Int32, eager=True)
    in_training = {
        "user": dense_users.is_in(training["user"].unique().implode()),
        "item": items["count"] > 0,
        "interaction": interactions["split"] == TRAIN,
    }
    tables = {"user": users, "item": items, "interaction": interactions}
    summaries: list[FeatureSummary] = []
    vocabularies = [_NO_VOCABULARY]
    for feature in config.features:
        table = _typed_feature(tables[feature.of], feature)
        tables[feature.of] = table
        seen = table.filter(in_training[feature.of])[feature.column].drop_nulls()
        vocabulary = _vocabulary(seen, feature) if feature.kind == "categorical" else None
        if vocabulary is not None:
            vocabularies.append(vocabulary)
        summaries.append(_summarize(seen, feature, table, vocabulary))
    files = {
        "users.parquet": tables["user"],
        "items.parquet": tables["item"],
        "interactions.parquet": tables["interaction"],
        "vocabulary.parquet": pl.concat(vocabularies),
    }
    return files, tuple(summaries), dropped


# --- rows ---------------------------------------------------------------------------------------


def _time_order(interactions: pl.DataFrame) -> list[str]:
    """Sort keys of time; ties, and data without timestamps, keep the order of the files."""
    return ["timestamp", "row"] if "timestamp" in interactions.columns else ["row"]


def _filter(rows: pl.DataFrame, filters: Filters) -> tuple[pl.DataFrame, Dropped]:
    """Rating, duplicates ("first" and "last" in time), then the k-core."""
    heights = [rows.height]
    if filters.min_rating is not None:
        if "rating" not in rows.columns:
            raise DataError(
                "data.filters.min_rating: needs ratings, data.columns.rating is not set; set it"
            )
        rows = rows.filter(pl.col("rating") >= filters.min_rating)
    heights.append(rows.height)
    if filters.duplicates != "keep":
        rows = rows.sort(_time_order(rows)).unique(
            ["user", "item"], keep=filters.duplicates, maintain_order=True
        )
    heights.append(rows.height)
    in_core = (pl.len().over("user") >= filters.user_core) & (
        pl.len().over("item") >= filters.item_core
    )
    # Dropping an item can push a user below its limit, and the other way round.
    before = -1
    while rows.height != before:
        before = rows.height
        rows = rows.filter(in_core)
    heights.append(rows.height)
    taken = [before - after for before, after in pairwise(heights)]
    dropped = Dropped(rating=taken[0], duplicates=taken[1], core=taken[2])
    if not rows.height:
        raise DataError(
            f"data.filters: nothing is left of {heights[0]} rows; min_rating took {taken[0]}, "
            f"duplicates {taken[1]}, user_core and item_core {taken[2]}; loosen them"
        )
    return rows, dropped


def _split(rows: pl.DataFrame, split: Split, seed: int) -> pl.DataFrame:
    """Set the column `split` (Int8), by rows in the order of the files or of time."""
    rows = rows.sort("user", *_time_order(rows))
    position, length = pl.int_range(pl.len()).over("user"), pl.len().over("user")
    match split:
        case LeaveOneOutSplit():
            from_end = length - 1 - position
            valid, test = from_end == 1, from_end == 0
            code = pl.when(length < 3).then(TRAIN).otherwise(_code(valid, test))
        case TemporalSplit():
            if "timestamp" not in rows.columns:
                raise DataError(
                    "data.split: temporal needs times, data.columns.timestamp is not set; set it"
                )
            time = pl.col("timestamp")
            code = _code(time >= split.valid_from, time >= split.test_from)
        case RatioSplit(over="user"):
            code = _ratio_code(position, length, split)
        case RatioSplit():
            # Drawn in the order of the files, so that it does not depend on the sort above.
            rows = rows.sort("row")
            draw = np.random.default_rng(seed).permutation(rows.height)
            code = _ratio_code(pl.lit(pl.Series(draw)), pl.len(), split)
        case GivenSplit():
            code = _given_code(rows)
    rows = rows.with_columns(code.cast(pl.Int8).alias("split"))
    if not (rows["split"] == TRAIN).any():
        raise DataError(
            f"data.split: {split.rule} leaves no training row of {rows.height}; change the split"
        )
    return rows


def _code(valid: pl.Expr, test: pl.Expr) -> pl.Expr:
    return pl.when(test).then(TEST).when(valid).then(VALID).otherwise(TRAIN)


def _ratio_code(position: pl.Expr, length: pl.Expr, split: RatioSplit) -> pl.Expr:
    """Parts are rounded down, so that training never ends up empty."""
    slack = 1e-9  # 0.29 * 100 is 28.999999999999996
    num_test = (length * split.test + slack).floor()
    num_valid = (length * split.valid + slack).floor()
    return _code(position >= length - num_test - num_valid, position >= length - num_test)


def _given_code(rows: pl.DataFrame) -> pl.Expr:
    codes = {"train": TRAIN, "valid": VALID, "test": TEST}
    if "split" not in rows.columns:
        raise DataError("data.split: given needs a column, data.columns.split is not set; set it")
    unknown = rows.filter(~pl.col("split").cast(pl.String).is_in(list(codes)).fill_null(False))
    if unknown.height:
        raise DataError(
            f'data.columns.split: cells must be "train", "valid" or "test", found '
            f'"{unknown["split"][0] or ""}" in {unknown.height} rows; rename or drop them'
        )
    return pl.col("split").cast(pl.String).replace_strict(codes)


def _renumber(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Interactions with dense ids, and the users and items that these stand for."""
    users = rows.sort("row").select(external_id="user").unique(keep="first", maintain_order=True)
    items = (
        rows.group_by(pl.col("item").alias("external_id"))
        .agg(count=(pl.col("split") == TRAIN).sum().cast(pl.Int64), first_row=pl.col("row").min())
        .sort("count", "first_row", descending=[True, False])
        .drop("first_row")
    )
    for name, table in (("user", users), ("item", items)):
        dense = table.select(
            pl.col("external_id").alias(name),
            pl.int_range(pl.len(), dtype=pl.Int32).alias("dense"),
        )
        rows = rows.join(dense, on=name).drop(name).rename({"dense": name})
    rows = rows.sort("user", *_time_order(rows)).drop("row")
    order = ["user", "item", "timestamp", "rating", "label", "split"]
    known = [name for name in order if name in rows.columns]
    return rows.select(*known, pl.exclude(known)), users, items


# --- features -----------------------------------------------------------------------------------


def _with_features(entities: pl.DataFrame, features: pl.LazyFrame | None) -> pl.DataFrame:
    if features is None:
        return entities
    wanted = features.join(entities.lazy().select("external_id"), on="external_id", how="semi")
    return entities.join(
        wanted.collect(engine="streaming"), on="external_id", how="left", maintain_order="left"
    )


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
        return FeatureSummary(feature=feature, dim=len(vectors[0]) if len(vectors) else None)
    if vocabulary is not None:
        return FeatureSummary(feature=feature, num_values=vocabulary.height + 1)
    return FeatureSummary(feature=feature)


# --- files --------------------------------------------------------------------------------------


def _describe(path: Path) -> Source:
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return Source(name=str(path), num_bytes=path.stat().st_size, sha256=digest.hexdigest())


def _fingerprint(config: DataConfig, seed: int, sources: tuple[Source, ...]) -> str:
    content = {
        "config": config.model_dump(mode="json", exclude={"prepared"}),
        "seed": seed,
        "format_version": FORMAT_VERSION,
        "sources": [source.sha256 for source in sources],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _existing(out: Path) -> Manifest | None:
    """What is there already; None for nothing or an empty folder."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(
            f"{out}: holds something that is no prepared dataset; "
            "choose another data.prepared or remove it"
        )
    return load_manifest(out)


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it takes the place of `out` when the block ends well.

    An error leaves `out` as it was. A kill does too, or, between the two renames, leaves no `out`.
    Leftovers of a killed run go away first.

    Raises:
        DataError: instead of an OSError or PolarsError (no space, no permission).
    """
    partial, replaced = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    try:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        if out.exists():
            out.rename(replaced)
        try:
            partial.rename(out)
        except OSError:
            if replaced.exists():
                replaced.rename(out)
            raise
        _fsync(out.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{out}: cannot be written, {reason}; check free space and permissions"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
