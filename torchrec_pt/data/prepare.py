"""Raw interactions -> the prepared dataset: filtered, split, renumbered, and written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import polars as pl

from torchrec_pt.config import DataConfig
from torchrec_pt.data.atomic import exclusive, scratch_beside, whole_or_nothing
from torchrec_pt.data.engine import Interactions, OpenInteractions
from torchrec_pt.data.errors import DataError, reading
from torchrec_pt.data.features import (
    NO_VOCABULARY,
    describe_feature,
    join_features,
    typed_feature,
)
from torchrec_pt.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FeatureSummary,
    FormatVersionError,
    Manifest,
    Part,
    Source,
    load_manifest,
)
from torchrec_pt.data.numbering import append_unseen, order_items, order_users
from torchrec_pt.data.partitioned_engine import open_locally
from torchrec_pt.data.parts import cut, cut_parts, write_row_groups
from torchrec_pt.data.readers import RawData, read_raw
from torchrec_pt.data.sources import find_sources
from torchrec_pt.data.splits import (
    TEST,
    TRAIN,
    VALID,
    fewest_to_evaluate,
)
from torchrec_pt.data.text_encoder import Encode, TextEncoder, find_encoders, load_encoder
from torchrec_pt.data.text_vectors import write_text_vectors
from torchrec_pt.files import sha256

_ITEMS_PER_GROUP = 4096  # of their texts' vectors, which are written a row group at a time


def prepare(
    config: DataConfig,
    out: Path,
    seed: int,
    open_interactions: OpenInteractions = open_locally,
) -> Manifest:
    """Write the prepared dataset of a `data` section into the folder `out`.

    The folder appears whole or not at all, with manifest.json and
        users.parquet         row = dense user id (order of first training row in the raw files);
                              external_id, features
        items.parquet         row = dense item id (descending count, then order of first training
                              row); external_id, count (how often taken in training), features
        interactions.parquet  user, item (dense, Int32), timestamp, rating, label, split (Int8:
                              0 train, 1 valid, 2 test), features; sorted by user, then time,
                              then place in the raw files
        vocabulary.parquet    of, column, value, id: the categories seen in training; 0 = unknown
        text_<n>.parquet      vector: a row for each user or item, of the n-th feature, a text with
                              an encoder; zeros where there is no text
    Users and items that never train come last, by first row; after them, where `keep_unseen_items`
    says so, the items that the item file alone has, in its order. The users and their interactions
    stand in row groups of the same users, the manifest's `parts`. Features that stand in the
    interactions are those of the first training row of a user or item, else of the first row.
    Numeric features are Float32, categorical ones String or List(String), vectors List(Float32).

    A dataset made there from the same config, seed, format version, raw files and encoders is kept
    as it is; any other prepared dataset is replaced.

    Args:
        seed: of a random split.
        open_interactions: who works on the interactions; the dataset does not depend on it.
    Raises:
        DataError: bad raw data, nothing left to train on, `out` is something else, another
            process is preparing it, a full disk, an encoder that is not there.
        WriteError: no space for what waits on the disk.
    """
    out = Path(out)
    sources = tuple(_describe(path) for path in find_sources(config).files)
    encoders = find_encoders(config.features)
    fingerprint = _fingerprint(config, seed, sources, [encoder.sha256 for encoder in encoders])
    if kept := _existing(out, fingerprint):
        return kept
    with exclusive(out):
        if kept := _existing(out, fingerprint):  # written since we looked
            return kept
        loaded = [(encoder, load_encoder(encoder)) for encoder in encoders]
        raw = read_raw(config)
        with whole_or_nothing(out) as folder, scratch_beside(out) as scratch:
            rows = open_interactions(config, raw, scratch)
            dropped = rows.filter(config.filters)
            counts = rows.split(config.split, seed)
            users, items = _entities(config, rows, raw)
            parts = cut_parts(users)
            of_rows = [feature for feature in config.features if feature.of == "interaction"]
            rows.number(users, items, parts, of_rows)
            rows.write(folder / "interactions.parquet", parts)
            tables, summaries = _describe_features(config, raw, rows, users, items)
            heights = {"users.parquet": [part.num_users for part in parts]}
            for name, table in tables.items():
                write_row_groups(folder / name, cut(table, heights.get(name, [table.height])))
            summaries = _encode_texts(folder, tables, parts, summaries, loaded)
            short = users["num_rows"] < fewest_to_evaluate(config.split)
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                fingerprint=fingerprint,
                seed=seed,
                columns=config.columns,
                features=summaries,
                num_users=tables["users.parquet"].height,
                num_items=tables["items.parquet"].height,
                num_interactions=sum(counts.num_rows),
                num_train=counts.num_rows[TRAIN],
                num_valid=counts.num_rows[VALID],
                num_test=counts.num_rows[TEST],
                num_taken_valid=counts.num_taken[VALID],
                num_taken_test=counts.num_taken[TEST],
                num_impressions=sum(counts.num_rows) - sum(counts.num_taken),
                num_repeats=counts.num_repeats,
                num_short_users=int(short.sum()),
                split=config.split,
                filters=config.filters,
                dropped=dropped,
                parts=parts,
                sources=sources,
                files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
            )
            (folder / MANIFEST_NAME).write_text(
                manifest.model_dump_json(indent=2), encoding="utf-8"
            )
    return manifest


def _entities(
    config: DataConfig, rows: Interactions, raw: RawData
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Users and items by dense id, as `numbering.entities` describes them."""
    users, items = rows.entities()
    users, items = order_users(users), order_items(items)
    if not items["count"].sum():
        raise DataError(
            "data.columns.label: no training row has a label above 0, so nothing was taken; name "
            "the column that tells clicks from impressions, or change the split"
        )
    if config.keep_unseen_items:
        with reading(config.path, raw.sources):
            items = append_unseen(items, raw.items)
    return users, items


def _describe_features(
    config: DataConfig,
    raw: RawData,
    rows: Interactions,
    users: pl.DataFrame,
    items: pl.DataFrame,
) -> tuple[dict[str, pl.DataFrame], tuple[FeatureSummary, ...]]:
    """The content of each Parquet file but the interactions', by name, and all summaries."""
    with reading(config.path, raw.sources):
        tables = {
            "user": join_features(users.drop("trains", "num_rows"), raw.users),
            "item": join_features(items.drop("trains", "num_rows"), raw.items),
        }
    in_training = {"user": users["trains"], "item": items["trains"]}
    summaries, vocabularies = [], [NO_VOCABULARY]
    for feature in config.features:
        if feature.of == "interaction":
            # One column at a time: the rows may not fit into memory.
            column, trains = rows.column(feature.column), rows.column("split") == TRAIN
        else:
            tables[feature.of] = typed_feature(tables[feature.of], feature)
            column, trains = tables[feature.of][feature.column], in_training[feature.of]
        summary, vocabulary = describe_feature(feature, column, trains)
        summaries.append(summary)
        vocabularies.append(vocabulary)
    files = {
        "users.parquet": tables["user"].drop("count", "row"),
        "items.parquet": tables["item"].drop("row"),
        "vocabulary.parquet": pl.concat(vocabularies),
    }
    return files, tuple(summaries)


def _encode_texts(
    folder: Path,
    tables: Mapping[str, pl.DataFrame],
    parts: Sequence[Part],
    summaries: tuple[FeatureSummary, ...],
    loaded: Sequence[tuple[TextEncoder, Encode]],
) -> tuple[FeatureSummary, ...]:
    """Write the vectors of the texts that have an encoder; their summaries say where they are."""
    items = tables["items.parquet"]
    ends = [*range(0, items.height, _ITEMS_PER_GROUP), items.height]
    heights = {
        "user": [part.num_users for part in parts],
        "item": [end - begin for begin, end in pairwise(ends)],
    }
    num_training = {
        "user": sum(part.num_training for part in parts),
        "item": int((items["count"] > 0).sum()),
    }
    described = list(summaries)
    for encoder, encode in loaded:
        feature = encoder.feature
        place = [summary.feature for summary in summaries].index(feature)
        name = f"text_{place}.parquet"
        encoded = write_text_vectors(
            folder / name,
            tables[f"{feature.of}s.parquet"][feature.column],
            encode,
            heights=heights[feature.of],
            num_training=num_training[feature.of],
            where=encoder.where,
        )
        found = {} if encoded is None else {"vectors_file": name, **encoded._asdict()}
        found |= {"encoder_sha256": encoder.sha256}
        described[place] = summaries[place].model_copy(update=found)
    return tuple(described)


def _describe(path: Path) -> Source:
    with reading(path):
        return Source(name=str(path), num_bytes=path.stat().st_size, sha256=sha256(path))


def is_prepared_from(manifest: Manifest, config: DataConfig, seed: int) -> bool:
    """Whether a dataset was made from this `data` section and seed, whatever its files hold now."""
    encoders = [summary.encoder_sha256 for summary in manifest.features]
    known = [digest for digest in encoders if digest is not None]
    return manifest.fingerprint == _fingerprint(config, seed, manifest.sources, known)


def _fingerprint(
    config: DataConfig, seed: int, sources: tuple[Source, ...], encoders: Sequence[str]
) -> str:
    content = {
        "config": config.model_dump(mode="json", exclude={"prepared"}),
        "seed": seed,
        "format_version": FORMAT_VERSION,
        "sources": [source.sha256 for source in sources],
        "encoders": encoders,
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
