"""What the web page and the checks of ids need to know of the data that is served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import polars as pl
import torch

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.errors import DataError
from torchrec_pt.distributed import Ranks
from torchrec_pt.external_ids import Places


class UnknownIdError(ValueError):
    """A user or item that the served data does not have; the message is one line."""


class Catalogue:
    """Ids, titles and histories of one dataset; its tables are read when it is built."""

    def __init__(self, dataset: PreparedDataset, ranks: Ranks) -> None:
        self._dataset = dataset
        self._places = Places(dataset, ranks)
        self._user_ids = dataset.users["external_id"]
        self._user_texts = self._user_ids.cast(pl.String)
        self._item_ids = dataset.items["external_id"]
        self._titles = _titles(dataset)
        self._lower_titles = self._titles.str.to_lowercase()
        self._history = dataset.history("test")

    def check_user(self, field: str, user: str | int) -> None:
        """
        Raises:
            UnknownIdError: no such user.
        """
        with _known(field):
            self._places.of_own_users([user])

    def check_item(self, field: str, item: str | int) -> None:
        """
        Raises:
            UnknownIdError: no such item.
        """
        with _known(field):
            self._places.of_items([item])

    def check_items(self, field: str, items: Sequence[str | int]) -> None:
        """
        Raises:
            UnknownIdError: the first of them that is no item.
        """
        for index, item in enumerate(items):
            self.check_item(f"{field}[{index}]", item)

    def titles(self, items: Sequence[str | int]) -> list[str]:
        """Of items that there are, in their order."""
        return self._titles[self._places.of_items(items).tolist()].to_list()

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


@contextlib.contextmanager
def _known(field: str) -> Iterator[None]:
    """
    Raises:
        UnknownIdError: for the data's own error, with the field in front.
    """
    try:
        yield
    except DataError as error:
        raise UnknownIdError(f"{field}: {error}") from None


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
