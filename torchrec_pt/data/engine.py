"""Who works on the interactions of a dataset that is being prepared.

They are the one table that may not fit into memory. Users, items and vocabularies are small
beside it: `prepare` has them in polars, whoever works on the interactions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import polars as pl

from torchrec_pt.config import DataConfig, Feature, Filters, Split
from torchrec_pt.data.manifest import Dropped, Part
from torchrec_pt.data.readers import RawData
from torchrec_pt.data.splits import RowCounts


class Interactions(Protocol):
    """The interactions of a dataset; its methods are called in this order."""

    def filter(self, filters: Filters) -> Dropped:
        """Drop rows by rating, duplicates ("first" and "last" in time), then by the k-core.

        Raises:
            DataError: nothing is left, or there are no ratings to filter by.
        """

    def split(self, split: Split, seed: int) -> RowCounts:
        """Give every row its split.

        Raises:
            DataError: a rule that the columns do not allow, or that leaves nothing to train on.
        """

    def entities(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Users and items, in any order: see `numbering.entities`."""

    def number(
        self,
        users: pl.DataFrame,
        items: pl.DataFrame,
        parts: Sequence[Part],
        features: Sequence[Feature],
    ) -> None:
        """Put dense ids in place of external ones, sort by user, then time, and type features.

        Args:
            users, items: `external_id`; the row is the dense id.
            parts: how the users are cut.
            features: those of interactions.
        """

    def write(self, path: Path, parts: Sequence[Part]) -> None:
        """A Parquet file of the numbered rows, one row group for each part."""

    def column(self, name: str) -> pl.Series:
        """One column of what was written; called as often as there is use for one."""


# The folder, which an engine may make for work in progress, goes away with the preparation.
OpenInteractions = Callable[[DataConfig, RawData, Path], Interactions]
