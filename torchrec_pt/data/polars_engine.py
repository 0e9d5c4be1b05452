"""Interactions in the memory of this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from torchrec_pt.config import DataConfig, Feature, Filters, Split
from torchrec_pt.data.errors import reading
from torchrec_pt.data.features import typed_feature
from torchrec_pt.data.filters import count_dropped, filter_rows, k_core
from torchrec_pt.data.manifest import Dropped, Part
from torchrec_pt.data.numbering import dense_ids, entities, renumber
from torchrec_pt.data.parts import cut, write_row_groups
from torchrec_pt.data.readers import RawData
from torchrec_pt.data.splits import RowCounts, assign_splits, count_rows


class PolarsInteractions:
    """See `engine.Interactions`."""

    def __init__(self, config: DataConfig, raw: RawData, scratch: Path) -> None:
        with reading(config.path, raw.sources):
            self._rows = raw.interactions.collect(engine="streaming")

    def filter(self, filters: Filters) -> Dropped:
        self._rows, heights = filter_rows(self._rows, filters)
        self._rows = k_core(self._rows, filters)
        return count_dropped(heights, self._rows.height)

    def split(self, split: Split, seed: int) -> RowCounts:
        self._rows = assign_splits(self._rows, split, seed)
        return count_rows(self._rows)

    def entities(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        return entities(self._rows, "user"), entities(self._rows, "item")

    def number(
        self,
        users: pl.DataFrame,
        items: pl.DataFrame,
        parts: Sequence[Part],
        features: Sequence[Feature],
    ) -> None:
        dense = {
            "user": dense_ids(users["external_id"], "user"),
            "item": dense_ids(items["external_id"], "item"),
        }
        self._rows = renumber(self._rows, dense)
        for feature in features:
            self._rows = typed_feature(self._rows, feature)

    def write(self, path: Path, parts: Sequence[Part]) -> None:
        write_row_groups(path, cut(self._rows, [part.num_rows for part in parts]))

    def column(self, name: str) -> pl.Series:
        return self._rows[name]
