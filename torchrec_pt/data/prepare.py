"""Raw interactions -> the prepared dataset: filtered, split, renumbered, and written atomically."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import polars as pl

from torchrec_pt.config import DataConfig
from torchrec_pt.data.atomic import exclusive, whole_or_nothing
from torchrec_pt.data.errors import DataError, reading
from torchrec_pt.data.features import describe_features, join_features
from torchrec_pt.data.filters import apply_filters
from torchrec_pt.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Dropped,
    FeatureSummary,
    FormatVersionError,
    Manifest,
    Source,
    load_manifest,
)
from torchrec_pt.data.numbering import renumber
from torchrec_pt.data.parts import cut_parts, write_row_groups
from torchrec_pt.data.readers import RawData, read_raw
from torchrec_pt.data.sources import find_sources
from torchrec_pt.data.splits import TEST, TRAIN, VALID, assign_splits, fewest_to_evaluate
from torchrec_pt.files import sha256


def prepare(config: DataConfig, out: Path, seed: int) -> Manifest:
    """Write the prepared dataset of a `data` section into the folder `out`.

    The folder appears whole or not at all, with manifest.json and
        users.parquet         row = dense user id (order of first training row in the raw files);
                              external_id, features
        items.parquet         row = dense item id (descending training count, then order of first
                              training row); external_id, count (training only), features
        interactions.parquet  user, item (dense, Int32), timestamp, rating, label, split (Int8:
                              0 train, 1 valid, 2 test), features; sorted by user, then time,
                              then place in the raw files
        vocabulary.parquet    of, column, value, id: the categories seen in training; 0 = unknown
    Users and items that never train come last, by first row. The users and their interactions stand
    in row groups of the same users, the manifest's `parts`. Features that stand in the
    interactions are those of the first training row of a user or item, else of the first row.
    Numeric features are Float32, categorical ones String or List(String), vectors List(Float32).

    A dataset made there from the same config, seed, format version and raw files is kept as it is;
    any other prepared dataset is replaced.

    Args:
        seed: of a random split.
    Raises:
        DataError: bad raw data, nothing left to train on, `out` is something else, another
            process is preparing it, a full disk.
    """
    out = Path(out)
    sources = tuple(_describe(path) for path in find_sources(config).files)
    fingerprint = _fingerprint(config, seed, sources)
    if kept := _existing(out, fingerprint):
        return kept
    with exclusive(out):
        if kept := _existing(out, fingerprint):  # written since we looked
            return kept
        tables, summaries, dropped = _build_tables(config, read_raw(config), seed)
        with whole_or_nothing(out) as folder:
            rows = tables["interactions.parquet"]
            parts = cut_parts(rows)
            heights = {
                "users.parquet": [part.num_users for part in parts],
                "interactions.parquet": [part.num_rows for part in parts],
            }
            for name, table in tables.items():
                write_row_groups(folder / name, table, heights.get(name, [table.height]))
            split, num_of_user = rows["split"], rows.group_by("user").len()["len"]
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
                num_repeats=rows.height - rows.select("user", "item").n_unique(),
                num_short_users=int((num_of_user < fewest_to_evaluate(config.split)).sum()),
                split=config.split,
                filters=config.filters,
                dropped=dropped,
                parts=parts,
                sources=sources,
                files={name: (folder / name).stat().st_size for name in tables},
            )
            (folder / MANIFEST_NAME).write_text(
                manifest.model_dump_json(indent=2), encoding="utf-8"
            )
    return manifest


def _build_tables(
    config: DataConfig, raw: RawData, seed: int
) -> tuple[dict[str, pl.DataFrame], tuple[FeatureSummary, ...], Dropped]:
    """The content of each parquet file, by name."""
    with reading(config.path, raw.sources):
        interactions = raw.interactions.collect(engine="streaming")
    interactions, dropped = apply_filters(interactions, config.filters)
    interactions = assign_splits(interactions, config.split, seed)
    interactions, users, items = renumber(interactions)
    with reading(config.path, raw.sources):
        users, items = join_features(users, raw.users), join_features(items, raw.items)
    tables, summaries, vocabulary = describe_features(
        config.features,
        {"user": users, "item": items, "interaction": interactions},
        in_training={
            "user": users["count"] > 0,
            "item": items["count"] > 0,
            "interaction": interactions["split"] == TRAIN,
        },
    )
    files = {
        "users.parquet": tables["user"].drop("count", "row"),
        "items.parquet": tables["item"].drop("row"),
        "interactions.parquet": tables["interaction"],
        "vocabulary.parquet": vocabulary,
    }
    return files, summaries, dropped


def _describe(path: Path) -> Source:
    with reading(path):
        return Source(name=str(path), num_bytes=path.stat().st_size, sha256=sha256(path))


def is_prepared_from(manifest: Manifest, config: DataConfig, seed: int) -> bool:
    """Whether a dataset was made from this `data` section and seed, whatever its files hold now."""
    return manifest.fingerprint == _fingerprint(config, seed, manifest.sources)


def _fingerprint(config: DataConfig, seed: int, sources: tuple[Source, ...]) -> str:
    content = {
        "config": config.model_dump(mode="json", exclude={"prepared"}),
        "seed": seed,
        "format_version": FORMAT_VERSION,
        "sources": [source.sha256 for source in sources],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _existing(out: Path, fingerprint: str) -> Manifest | None:
    """The dataset that is there already, if it is the wanted one.

    Raises:
        DataError: something is there that must not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(
            f"{out}: holds something that is no prepared dataset; "
            "choose another data.prepared or remove it"
        )
    try:
        manifest = load_manifest(out)
    except FormatVersionError:
        return None
    return manifest if manifest.fingerprint == fingerprint else None
