"""A prepared dataset in memory: jagged histories, splits, and the way from external ids to rows."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from torchrec_pt.data.errors import DataError
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.manifest import FeatureSummary, Manifest, load_manifest
from torchrec_pt.data.parts import read_row_groups
from torchrec_pt.data.splits import SPLIT_CODES
from torchrec_pt.data.text_vectors import COLUMN
from torchrec_pt.distributed import Ranks


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """What `prepare` wrote, of the parts that this rank has; one process has all of it.

    The U users of a rank are those of its parts, in the order of dense ids. What is said of users
    goes by their place among these, 0 … U − 1. The N interactions are sorted by user, then time.

    Attributes:
        user_ids: (U,) int64 dense ids of the users.
        part_of_user: (U,) int64, ascending: which of the manifest's parts a user belongs to.
        interactions: item ids (N,) int64 in one row per user, their times beside them.
        split: (N,) int8: 0 train, 1 valid, 2 test.
        rating, label: (N,) float32, or None where the raw data had no such column.
        A row of label 0 is an impression: an item that was shown and not taken. It is no part of
        histories, targets and counts.
        timestamp: (N,) float64, or None.
        interaction_features: N rows of the configured features of interactions, typed as in
            `prepare`; without columns where there are none.
        item_counts: (num_items,) int64: how often each item was taken in training, by all users.
    """

    path: Path
    manifest: Manifest
    user_ids: Tensor
    part_of_user: Tensor
    interactions: Jagged
    split: Tensor
    rating: Tensor | None
    timestamp: Tensor | None
    label: Tensor | None
    interaction_features: pl.DataFrame
    item_counts: Tensor

    @classmethod
    def load(cls, path: str | Path, ranks: Ranks | None = None) -> PreparedDataset:
        """Read the folder that `prepare` wrote: part k on rank k mod world_size.

        Args:
            ranks: None reads every part.
        Raises:
            DataError: no prepared dataset there, or one that is damaged.
        """
        path = Path(path)
        manifest = load_manifest(path)
        rank, world_size = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
        own = torch.arange(len(manifest.parts))[rank::world_size]
        with _undamaged(path):
            rows = read_row_groups(path / "interactions.parquet", own.tolist())
            counts = pl.read_parquet(path / "items.parquet", columns=["count"], glob=False)
        sizes = torch.tensor([part.num_users for part in manifest.parts])
        timestamp = _optional_tensor(rows, "timestamp", pl.Float64)
        own_sizes = sizes[own]
        skipped = (sizes.cumsum(0) - sizes)[own] - (own_sizes.cumsum(0) - own_sizes)
        user_ids = torch.arange(int(own_sizes.sum())) + skipped.repeat_interleave(own_sizes)
        user = torch.searchsorted(user_ids, _tensor(rows["user"], pl.Int64))
        lengths = torch.bincount(user, minlength=len(user_ids))
        return cls(
            path=path,
            manifest=manifest,
            user_ids=user_ids,
            part_of_user=own.repeat_interleave(own_sizes),
            interactions=Jagged.from_lengths(_tensor(rows["item"], pl.Int64), lengths, timestamp),
            split=_tensor(rows["split"], pl.Int8),
            rating=_optional_tensor(rows, "rating", pl.Float32),
            timestamp=timestamp,
            label=_optional_tensor(rows, "label", pl.Float32),
            interaction_features=rows.select(
                summary.feature.column
                for summary in manifest.features
                if summary.feature.of == "interaction"
            ),
            item_counts=_tensor(counts["count"], pl.Int64),
        )

    @cached_property
    def users(self) -> pl.DataFrame:
        """This rank's users: `external_id` and feature columns. Read when first asked for."""
        with _undamaged(self.path):
            own = self.part_of_user.unique().tolist()
            return read_row_groups(self.path / "users.parquet", own)

    @cached_property
    def items(self) -> pl.DataFrame:
        """Row = dense item id: `external_id`, `count`, features. Read when first asked for."""
        with _undamaged(self.path):
            return pl.read_parquet(self.path / "items.parquet", glob=False)

    def text_vectors(self, summary: FeatureSummary) -> Tensor:
        """(rows of `users` or `items`, dim) float32 of a text that prepare encoded, as they are.

        Raises:
            DataError: a file that cannot be read.
        """
        assert summary.vectors_file is not None
        file = self.path / summary.vectors_file
        with _undamaged(self.path):
            if summary.feature.of == "user":
                rows = read_row_groups(file, self.part_of_user.unique().tolist())
            else:
                rows = pl.read_parquet(file, glob=False)
        return torch.from_numpy(rows[COLUMN].to_numpy(writable=True))

    @cached_property
    def vocabulary(self) -> pl.DataFrame:
        """`of`, `column`, `value`, `id` of the categories; read when first asked for."""
        with _undamaged(self.path):
            return pl.read_parquet(self.path / "vocabulary.parquet", glob=False)

    def external_user_ids(self) -> pl.Series:
        """Of all users, on every rank alike, by dense id; for what is written by user."""
        with _undamaged(self.path):
            file = self.path / "users.parquet"
            return pl.read_parquet(file, columns=["external_id"], glob=False)["external_id"]

    @property
    def num_users(self) -> int:
        """Of this rank; the manifest counts all."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return self.manifest.num_items

    @property
    def num_trained_items(self) -> int:
        """Items that were taken in training; dense ids count these first."""
        return int((self.item_counts > 0).sum())

    @cached_property
    def is_taken(self) -> Tensor:
        """(N,) bool: which rows are interactions, not mere impressions."""
        if self.label is None:
            return torch.ones_like(self.split, dtype=torch.bool)
        return self.label > 0

    def history(self, through: Literal["train", "valid", "test"]) -> Jagged:
        """Items that each user took, in time order, of this split and the ones before it."""
        return self.interactions.filter(self.is_taken & (self.split <= SPLIT_CODES[through]))

    def targets(self, split: Literal["valid", "test"]) -> Jagged:
        """Items that each user took in exactly this split, in time order; a row may be empty."""
        return self.interactions.filter(self.is_taken & (self.split == SPLIT_CODES[split]))

    def user_index(self, external_id: str | int) -> int:
        """Place of one of this rank's users; "196" and 196 name the same one.

        Raises:
            DataError: no such user.
        """
        return _index_of(self.users["external_id"], external_id, "user")

    def has_user(self, external_id: str | int) -> bool:
        """Whether it is one of this rank's users."""
        return _find(self.users["external_id"], str(external_id)) is not None

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


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: damaged, {reason}; remove the folder and prepare it again"
        ) from None


def _find(ids: pl.Series, text: str) -> int | None:
    if ids.dtype == pl.String:
        return ids.index_of(text)
    return ids.index_of(int(text)) if _is_int64(text) else None


def _index_of(ids: pl.Series, external_id: str | int, what: str) -> int:
    found = _find(ids, str(external_id))
    if found is None:
        raise _unknown(ids, external_id, what)
    return found


def indices_of(ids: pl.Series, wanted: Sequence[str | int], what: str) -> Tensor:
    """(N,) int64 places of N external ids among `ids`; "242" and 242 name the same one.

    Raises:
        DataError: one that is not there.
    """
    known = pl.DataFrame({"text": ids.cast(pl.String)}).with_row_index("place")
    asked = pl.DataFrame({"text": map(str, wanted)}, schema={"text": pl.String})
    places = asked.join(known, on="text", how="left", maintain_order="left")["place"]
    if places.has_nulls():
        raise _unknown(ids, wanted[int(places.is_null().arg_max() or 0)], what)
    return _tensor(places, pl.Int64)


def _unknown(ids: pl.Series, external_id: str | int, what: str) -> DataError:
    if ids.dtype == pl.String:
        # Fuzzy matching is slow: the head of the list is enough for a hint.
        near = difflib.get_close_matches(
            str(external_id), ids.head(10_000).to_list(), n=1, cutoff=0.6
        )
        hint = f'did you mean "{near[0]}"?' if near else f"an id looks like {ids[0]!r}"
    else:
        hint = f"ids are integers from {ids.min()!r} to {ids.max()!r}"
    return DataError(
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
