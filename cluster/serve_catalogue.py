"""What the web page and the checks of ids need to know of the data that is served."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import torch

from torchrec_pt.data.dataset import PreparedDataset


class UnknownIdError(ValueError):
    """A user or item that the served data does not have; the message is one line."""


class Catalogue:
    """Ids, titles and histories of one dataset; its tables are read when it is built."""

    def __init__(self, dataset: PreparedDataset) -> None:
        self._dataset = dataset
        self._user_ids = dataset.users["external_id"]
        self._item_ids = dataset.items["external_id"]
        self._titles = _titles(dataset)
        self._lower_titles = self._titles.str.to_lowercase()
        self._user_texts = self._user_ids.cast(pl.String)
        self._place = {str(id): place for place, id in enumerate(self._item_ids)}
        self._history = dataset.history("test")

    def check_user(self, field: str, user: str | int) -> None:
        """
        Raises:
            UnknownIdError: no such user.
        """
        if not self._dataset.has_user(user):
            raise UnknownIdError(
                f'{field}: user "{user}" is none of the {len(self._user_ids):,} that are known; '
                "give a history instead"
            )

    def check_items(self, field: str, items: Sequence[str | int]) -> None:
        """
        Raises:
            UnknownIdError: the first of them that is no item.
        """
        for index, item in enumerate(items):
            self._place_of(f"{field}[{index}]", item)

    def check_item(self, field: str, item: str | int) -> None:
        """
        Raises:
            UnknownIdError: no such item.
        """
        self._place_of(field, item)

    def title(self, item: str | int) -> str:
        """Of an item that there is."""
        return str(self._titles[self._place[str(item)]])

    def history(self, user: str | int) -> list[str | int]:
        """External ids of what a known user took, oldest first."""
        row = self._history.select(torch.tensor([self._dataset.user_index(user)]))
        return self._item_ids[row.values.tolist()].to_list()

    def find_items(self, query: str, limit: int) -> list[str | int]:
        """Items whose title contains the query, in any case; the most popular first."""
        found = self._lower_titles.str.contains(query.strip().lower(), literal=True)
        return self._item_ids.filter(found).head(limit).to_list()

    def find_users(self, query: str, limit: int) -> list[str | int]:
        """Users whose id begins with it, in the order of the data."""
        found = self._user_texts.str.starts_with(query.strip())
        return self._user_ids.filter(found).head(limit).to_list()

    def _place_of(self, field: str, item: str | int) -> int:
        place = self._place.get(str(item))
        if place is None:
            raise UnknownIdError(
                f'{field}: item "{item}" is none of the {len(self._item_ids):,} that are served'
            )
        return place


def _titles(dataset: PreparedDataset) -> pl.Series:
    """(num_items,) of each item its first text feature, or its id where that says nothing."""
    ids = dataset.items["external_id"].cast(pl.String)
    texts = [
        summary.feature.column
        for summary in dataset.manifest.features
        if summary.feature.of == "item" and summary.feature.kind == "text"
    ]
    if not texts:
        return ids
    titles = dataset.items[texts[0]].cast(pl.String)
    return pl.select(
        pl.when(titles.str.strip_chars() != "").then(titles).otherwise(ids)
    ).to_series()
