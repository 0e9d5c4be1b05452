"""Scores of users against the catalogue, each rank for its own range of items."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_pt.data.batch import Draw, Embedded, lookup_ids
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, gather_rows
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.item_table import ItemTable

# (users (B,) int64) -> (B, N_r) float32 scores of the items in this rank's range
Scorer = Callable[[Tensor], Tensor]


class ModelScorer:
    """Scores a block of users against this rank's range of the catalogue.

    Args:
        history: what each user took before, the rows of all users.
    """

    def __init__(self, backbone: Backbone, history: Jagged, ranks: Ranks) -> None:
        self.users = UserEncoder(backbone, history, ranks)
        begin, end = ranks.part_of(backbone.items.num_items)
        self.keys = encode_item_range(backbone, begin, end)

    def __call__(self, users: Tensor) -> Tensor:
        return self.users(users) @ self.keys.T


class UserEncoder:
    """(B,) users -> (B, D) vectors on every rank; each rank encodes its part of the block."""

    def __init__(self, backbone: Backbone, history: Jagged, ranks: Ranks) -> None:
        self.backbone = backbone
        self.history = history
        self.ranks = ranks

    @torch.no_grad()
    def __call__(self, users: Tensor) -> Tensor:
        begin, end = self.ranks.part_of(len(users))
        mine = users[begin:end]
        history = self.history.select(mine).to(self.ranks.device)
        return gather_rows(encode_histories(self.backbone, mine.to(self.ranks.device), history))


@torch.no_grad()
def encode_item_range(backbone: Backbone, begin: int, end: int) -> Tensor:
    """(end − begin, D) vectors of consecutive items; each rank asks for its own."""
    rows = backbone.items.rows(begin, end).detach()  # no_grad returns a whole weight as it is
    return backbone.encode_items(torch.arange(begin, end, device=rows.device), rows)


@torch.no_grad()
def encode_histories(backbone: Backbone, users: Tensor, history: Jagged) -> Tensor:
    """(R, D) vectors of users (R,) from R rows of item ids, of which the newest are read."""
    history = history.tail(backbone.history_length)
    vectors = backbone.items(lookup_ids(history.values))
    return backbone.encode_users(users, history.with_values(vectors))


def embed(items: ItemTable, draw: Draw, device: torch.device) -> Embedded:
    """A draw with the rows of its ids looked up; with a sharded table every rank calls."""
    ids = {name: lookup.to(device) for name, lookup in draw.lookups.items()}
    rows = items(lookup_ids(torch.cat([lookup.values for lookup in ids.values()])))
    parts = rows.split([len(lookup.values) for lookup in ids.values()])
    return Embedded(
        ids=ids,
        vectors={
            name: lookup.with_values(part)
            for (name, lookup), part in zip(ids.items(), parts, strict=True)
        },
        tensors={name: tensor.to(device) for name, tensor in draw.tensors.items()},
    )


def top_items(
    scores: Tensor, seen: Jagged | None, k: int, num_items: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The k best items of each user that are not in their row of `seen`.

    Args:
        scores: (B, N_r) of the items in this rank's range; those of seen items are overwritten.
    Returns:
        ids (B, k) int64 and scores (B, k) float32, best first; −inf where candidates ran out.
    """
    begin, _ = ranks.part_of(num_items)
    if seen is not None:
        hide(scores, seen.to(scores.device), begin)
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    if dist.get_world_size() == 1:
        return best.indices, best.values
    ids = gather_rows((best.indices + begin).T.contiguous()).T
    values = gather_rows(best.values.T.contiguous()).T
    merged = values.topk(min(k, values.shape[1]), dim=1)
    return ids.gather(1, merged.indices), merged.values


def hide(scores: Tensor, seen: Jagged, begin: int) -> None:
    """Overwrite the scores of seen items by −inf; scores (B, N_r) of the items from `begin`."""
    item = seen.values - begin
    is_held = (item >= 0) & (item < scores.shape[1])
    scores[seen.rows[is_held], item[is_held]] = -torch.inf
