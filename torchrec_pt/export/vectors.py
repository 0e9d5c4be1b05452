"""Vectors of items and users, block by block: made by all ranks together, the same on each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, gather_each, gather_rows
from torchrec_pt.learner import Learner
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.scoring import (
    ITEM_BLOCK,
    encode_histories,
    encode_item_range,
    head_of,
    look_up,
    own_items,
)

BLOCK_ROWS = 8192


def all_items(backbone: Backbone, ranks: Ranks) -> Iterator[Tensor]:
    """(≤ BLOCK_ROWS, dim) float32 blocks, in the order of dense ids."""
    for begin in range(0, backbone.items.num_items, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, backbone.items.num_items)
        mine = own_items(end - begin, ranks)
        yield gather_rows(encode_item_range(backbone, begin + mine.start, begin + mine.stop))


@torch.no_grad()
def some_items(backbone: Backbone, chosen: Tensor, ranks: Ranks) -> Iterator[Tensor]:
    """The same of these dense ids (N,), in their order."""
    for block in chosen.split(BLOCK_ROWS):
        mine = own_items(len(block), ranks)
        ids = block[mine.start : mine.stop].to(ranks.device)
        parts = zip(ids.split(ITEM_BLOCK), look_up(backbone, ids).split(ITEM_BLOCK), strict=True)
        yield gather_rows(torch.cat([backbone.encode_items(some, rows) for some, rows in parts]))


@torch.no_grad()
def all_users(learner: Learner, dataset: PreparedDataset, ranks: Ranks) -> Iterator[Tensor]:
    """Blocks of user vectors in the order of dense ids, each from the user's whole history.

    A block is one part of the dataset; the ranks make theirs of consecutive parts together.
    """
    encode = _UserEncoder(learner, dataset, ranks)
    users = torch.arange(dataset.num_users)
    parts = dataset.manifest.parts
    for first in range(0, len(parts), ranks.world_size):
        together = parts[first : first + ranks.world_size]
        mine = users[dataset.part_of_user == first + ranks.rank]
        vectors = [
            encode(mine[begin : begin + BLOCK_ROWS])
            for begin in range(0, max(part.num_users for part in together), BLOCK_ROWS)
        ]
        yield from gather_each(torch.cat(vectors))[: len(together)]


@torch.no_grad()
def some_users(
    learner: Learner, dataset: PreparedDataset, chosen: Tensor, ranks: Ranks
) -> Iterator[Tensor]:
    """The same of these dense ids (N,), in their order: blocks of BLOCK_ROWS."""
    encode = _UserEncoder(learner, dataset, ranks)
    for block in chosen.split(BLOCK_ROWS):
        (places,) = torch.isin(block, dataset.user_ids).nonzero(as_tuple=True)
        vectors = encode(torch.searchsorted(dataset.user_ids, block[places]))
        order = gather_rows(places.to(ranks.device)).argsort()
        yield gather_rows(vectors)[order]


class _UserEncoder:
    """(R, dim) vectors of users (R,) of this rank, with the map of a linear head in them."""

    def __init__(self, learner: Learner, dataset: PreparedDataset, ranks: Ranks) -> None:
        self.backbone = learner.backbone
        self.head = head_of(learner)
        self.history = dataset.history("test")
        self.device = ranks.device

    def __call__(self, users: Tensor) -> Tensor:
        rows = self.history.select(users).to(self.device)
        found = encode_histories(self.backbone, users.to(self.device), rows)
        return self.head.user_vectors(found)
