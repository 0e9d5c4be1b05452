"""What a prepared dataset says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from torchrec_pt.config import Columns, Feature, Filters, Section, Split
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.splits import fewest_to_evaluate

FORMAT_VERSION = 5
MANIFEST_NAME = "manifest.json"


class FormatVersionError(DataError):
    """A prepared dataset of another version of this package."""


class FeatureSummary(Section):
    """A feature and what training users, items or rows say about it.

    `mean` and `std` belong to numeric features; `std` is 1 where the values do not vary, so that
    (x - mean) / std is always defined. `num_values` counts the vocabulary of a categorical
    feature with its unknown value, id 0. `dim` is the length of a vector, given or encoded from
    text; `scale` the root mean square of the norms of those in training, 1 where there are none.
    `vectors_file` beside the manifest holds the vectors of a text, `encoder_sha256` names the
    content of the encoder's folder.
    """

    feature: Feature
    mean: float | None = None
    std: float | None = None
    num_values: int | None = None
    dim: int | None = None
    scale: float | None = None
    vectors_file: str | None = None
    encoder_sha256: str | None = None


class Source(Section):
    """A raw file that was read."""

    name: str
    num_bytes: int
    sha256: str


class Dropped(Section):
    """Rows that each filter took."""

    rating: int = 0
    duplicates: int = 0
    core: int = 0


class Part(Section):
    """Consecutive users and their rows: one row group of users.parquet and interactions.parquet.

    A rank reads its own parts. `num_training` counts the users who have a training row,
    `num_taking` those who took an item in training.
    """

    num_users: int
    num_rows: int
    num_training: int
    num_taking: int


class Manifest(Section):
    """The content of manifest.json.

    `num_impressions` counts the rows of label 0 or less: shown, not taken. `num_taken_valid` and
    `num_taken_test` are the other rows of these splits. `num_repeats` counts taken items that
    their user took before; `num_short_users` the users with fewer interactions than the split
    needs to evaluate them; `files` gives the size in bytes of the files beside it.
    """

    format_version: int
    fingerprint: str
    seed: int
    columns: Columns
    features: tuple[FeatureSummary, ...]
    num_users: int
    num_items: int
    num_interactions: int
    num_train: int
    num_valid: int
    num_test: int
    num_taken_valid: int
    num_taken_test: int
    num_impressions: int
    num_repeats: int
    num_short_users: int
    split: Split
    filters: Filters
    dropped: Dropped
    parts: tuple[Part, ...]
    sources: tuple[Source, ...]
    files: dict[str, int]


def notices(manifest: Manifest) -> list[str]:
    """What the user may not expect of the data, and the key that changes it: a line each."""
    lines = []
    if manifest.num_short_users:
        fewest = fewest_to_evaluate(manifest.split)
        lines.append(
            f"{manifest.num_short_users:,} of {manifest.num_users:,} users have fewer than "
            f"{fewest} interactions: they train but are not evaluated; "
            f"data.filters.user_core = {fewest} drops them"
        )
    if manifest.num_impressions:
        lines.append(
            f"{manifest.num_impressions:,} of {manifest.num_interactions:,} rows have label 0: "
            "shown and not taken, so no part of histories and rankings; ctr reads them, and "
            "finetune.ranking takes them as negatives"
        )
    if manifest.num_repeats:
        lines.append(
            f"{manifest.num_repeats:,} interactions repeat an earlier one of the same user and "
            'item: kept; data.filters.duplicates = "first" keeps one'
        )
    return lines


def require_rows(manifest: Manifest, part: Literal["validation", "test"]) -> None:
    """What trains needs validation rows, what evaluates needs test rows: items that were taken.

    Raises:
        DataError: the split left none.
    """
    if manifest.num_taken_valid if part == "validation" else manifest.num_taken_test:
        return
    if manifest.num_valid if part == "validation" else manifest.num_test:
        raise DataError(
            f"data.split: {manifest.split.rule} leaves {part} rows of label 0 alone, and nothing "
            "to rank; change the split, such as to temporal or ratio"
        )
    fewest = fewest_to_evaluate(manifest.split)
    if fewest > 1 and manifest.num_short_users == manifest.num_users:
        raise DataError(
            f"data.split: {manifest.split.rule} needs users with {fewest} interactions or more, "
            f"none of {manifest.num_users:,} has them; add interactions, loosen data.filters or "
            "choose another rule"
        )
    raise DataError(
        f"data.split: {manifest.split.rule} leaves no {part} row of "
        f"{manifest.num_interactions:,}; change the split"
    )


def load_manifest(path: str | Path) -> Manifest:
    """Read the manifest of the prepared dataset in the folder `path` and check its files' sizes.

    Raises:
        DataError: no prepared dataset there, a broken manifest, a format version that is not ours,
            or a file that is absent or has another size than when it was written.
    """
    path = Path(path)
    file = path / MANIFEST_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: holds no prepared dataset (no {MANIFEST_NAME}); prepare it first"
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{file}: cannot be read, {reason}; remove the folder and prepare it again"
        ) from None
    if not isinstance(content, dict) or "format_version" not in content:
        raise DataError(f"{file}: is no manifest of a prepared dataset; choose another folder")
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{file}: format version must be {FORMAT_VERSION}, found {version}; "
            "remove the folder and prepare it again"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{file}: broken at {key} ({first['msg']}); remove the folder and prepare it again"
        ) from None
    for name, num_bytes in manifest.files.items():
        part = path / name
        found = part.stat().st_size if part.is_file() else None
        if found != num_bytes:
            raise DataError(
                f"{part}: must have {num_bytes} bytes, "
                f"{'is missing' if found is None else f'has {found}'}; "
                "remove the folder and prepare it again"
            )
    return manifest
