"""From the users' own ids to rows, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import polars as pl
import torch
from torch import Tensor

from torchrec_pt.checkpoint import as_text
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, gather_objects, raised_together

ExternalId = str | int


class Places:
    """Rows of many ids at a time; "196" and 196 name the same one. Each id is held as a text."""

    def __init__(self, dataset: PreparedDataset, ranks: Ranks) -> None:
        self._dataset, self._ranks = dataset, ranks

    @cached_property
    def _items(self) -> dict[str, int]:
        return _by_text(self._dataset.items["external_id"])

    @cached_property
    def _own_users(self) -> dict[str, int]:
        return _by_text(self._dataset.users["external_id"])

    def of_items(self, items: Sequence[ExternalId]) -> Tensor:
        """(N,) int64 dense ids.

        Raises:
            ValueError: a text in place of a list.  DataError: no such item.
        """
        if isinstance(items, str):
            raise ValueError(f'items: must be a list of ids, given "{items}"; put it into one')
        places = [self._items.get(str(item), -1) for item in items]
        for item, place in zip(items, places, strict=True):
            if place < 0:
                self._dataset.item_index(item)  # raises, with a hint
        return torch.tensor(places, dtype=torch.int64)

    def of_own_users(self, users: Sequence[ExternalId]) -> Tensor:
        """(B,) int64 places of users on this rank, −1 for those of others; all ranks call it.

        Raises:
            ValueError: a text in place of a list.  DataError: no rank has this user.
        """
        if isinstance(users, str):
            raise ValueError(f'users: must be a list of ids, given "{users}"; put it into one')
        places = [self._own_users.get(str(user), -1) for user in users]
        if self._ranks.world_size == 1:
            for user, place in zip(users, places, strict=True):
                if place < 0:
                    self._dataset.user_index(user)  # raises, with a hint
        else:
            for user, *everywhere in zip(users, *gather_objects(places), strict=True):
                if max(everywhere) < 0:
                    find_user(self._dataset, user)
        return torch.tensor(places, dtype=torch.int64)


def find_user(dataset: PreparedDataset, external_id: ExternalId) -> int | None:
    """The user's place on the rank that has them, None on the others; all ranks call it.

    Raises:
        DataError: no rank has this user.
    """
    is_mine = dataset.has_user(external_id)
    if any(gather_objects(is_mine)):
        return dataset.user_index(external_id) if is_mine else None
    with raised_together():
        # A rank without users has no hint to give; the first rank has some.
        return dataset.user_index(external_id) if dataset.num_users else None


def _by_text(ids: pl.Series) -> dict[str, int]:
    return {text: place for place, text in enumerate(as_text(ids).to_list())}
