"""A prepared dataset in memory: jagged histories, splits, and the way from external ids to rows."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from torch import Tensor

from torchrec_pt.data.errors import DataError
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.manifest import Manifest, load_manifest
from torchrec_pt.data.splits import SPLIT_CODES


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """What `prepare` wrote, loaded whole. Rows N are sorted by user, then time.

    Attributes:
        users: row = dense user id; `external_id` and feature columns.
        items: row = dense item id; `external_id`, `count` and feature columns.
        interactions: item ids (N,) int64 in one row per user.
        split: (N,) int8: 0 train, 1 valid, 2 test.
        rating, label: (N,) float32, or None where the raw data had no such column.
        timestamp: (N,) float64, or None.
        interaction_features: N rows of the configured features of interactions, typed as in
            `prepare`; without columns where there are none.
        item_counts: (num_items,) int64: training interactions of each item.
    """

    path: Path
    manifest: Manifest
    users: pl.DataFrame
    items: pl.DataFrame
    interactions: Jagged
    split: Tensor
    rating: Tensor | None
    timestamp: Tensor | None
    label: Tensor | None
    interaction_features: pl.DataFrame
    item_counts: Tensor

    @classmethod
    def load(cls, path: str | Path) -> PreparedDataset:
        """Read the folder that `prepare` wrote.

        Raises:
            DataError: no prepared dataset there, or one that is damaged.
        """
        path = Path(path)
        manifest = load_manifest(path)
        try:
            users = pl.read_parquet(path / "users.parquet", glob=False)
            items = pl.read_parquet(path / "items.parquet", glob=False)
            rows = pl.read_parquet(path / "interactions.parquet", glob=False)
        except (pl.exceptions.PolarsError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{path}: damaged, {reason}; remove the folder and prepare it again"
            ) from None
        lengths = torch.bincount(_tensor(rows["user"], pl.Int64), minlength=users.height)
        return cls(
            path=path,
            manifest=manifest,
            users=users,
            items=items,
            interactions=Jagged.from_lengths(_tensor(rows["item"], pl.Int64), lengths),
            split=_tensor(rows["split"], pl.Int8),
            rating=_optional_tensor(rows, "rating", pl.Float32),
            timestamp=_optional_tensor(rows, "timestamp", pl.Float64),
            label=_optional_tensor(rows, "label", pl.Float32),
            interaction_features=rows.select(
                summary.feature.column
                for summary in manifest.features
                if summary.feature.of == "interaction"
            ),
            item_counts=_tensor(items["count"], pl.Int64),
        )

    @property
    def num_users(self) -> int:
        return self.users.height

    @property
    def num_items(self) -> int:
        return self.items.height

    def history(self, through: Literal["train", "valid", "test"]) -> Jagged:
        """Item ids of each user in time order, of this split and the ones before it."""
        return self.interactions.filter(self.split <= SPLIT_CODES[through])

    def targets(self, split: Literal["valid", "test"]) -> Jagged:
        """Item ids of each user in exactly this split, in time order; a row may be empty."""
        return self.interactions.filter(self.split == SPLIT_CODES[split])

    def user_index(self, external_id: str | int) -> int:
        """Dense id of a user; "196" and 196 name the same one.

        Raises:
            DataError: no such user.
        """
        return _index_of(self.users["external_id"], external_id, "user")

    def item_index(self, external_id: str | int) -> int:
        """Dense id of an item; "242" and 242 name the same one.

        Raises:
            DataError: no such item.
        """
        return _index_of(self.items["external_id"], external_id, "item")


def _tensor(series: pl.Series, dtype: type[pl.DataType]) -> Tensor:
    return torch.from_numpy(series.cast(dtype).to_numpy(writable=True))


def _optional_tensor(rows: pl.DataFrame, name: str, dtype: type[pl.DataType]) -> Tensor | None:
    return _tensor(rows[name], dtype) if name in rows.columns else None


def _index_of(ids: pl.Series, external_id: str | int, what: str) -> int:
    text = str(external_id)
    found = None
    if ids.dtype == pl.String:
        found = ids.index_of(text)
    elif _is_int64(text):
        found = ids.index_of(int(text))
    if found is not None:
        return found
    if ids.dtype == pl.String:
        # Fuzzy matching is slow: the head of the list is enough for a hint.
        near = difflib.get_close_matches(text, ids.head(10_000).to_list(), n=1, cutoff=0.6)
        hint = f'did you mean "{near[0]}"?' if near else f"an id looks like {ids[0]!r}"
    else:
        hint = f"ids are integers from {ids.min()!r} to {ids.max()!r}"
    raise DataError(
        f'{what} "{external_id}": not in the prepared dataset (it may have been filtered out); '
        f"{hint}"
    )


def _is_int64(text: str) -> bool:
    """Whether text is the canonical form of an int64, so that "0196" does not find 196."""
    digits = text.removeprefix("-")
    return (
        digits.isascii()
        and digits.isdigit()
        and len(digits) <= 19
        and str(int(text)) == text
        and -(2**63) <= int(text) < 2**63
    )
