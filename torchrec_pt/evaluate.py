"""Full-catalogue ranking: the rank of each held-out item among everything else.

Users come in blocks, and each rank scores a block against its own range of the
catalogue; only counts and a few best items travel. Nothing of users × items is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_pt.data.batch import lookup_ids
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, gather_rows, sum_over_ranks
from torchrec_pt.models.transformer import Transformer

# (users (B,) int64) -> (B, N_r) float32 scores of the items in this rank's range
Scorer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Who is asked, what they may not be offered, and what they took.

    Attributes:
        users: (U,) int64 users with at least one target.
        seen: U rows of items that are no candidates.
        targets: U rows of held-out items, always candidates.
    """

    users: Tensor
    seen: Jagged
    targets: Jagged


def held_out(dataset: PreparedDataset, split: Literal["valid", "test"]) -> HeldOut:
    """The users with targets in `split`; all they took before counts as seen.

    An item that a user took twice is one target.
    """
    targets = _distinct(dataset.targets(split), dataset.num_items)
    users = torch.nonzero(targets.lengths > 0).squeeze(1)
    seen = dataset.history("train" if split == "valid" else "valid")
    return HeldOut(users, seen.select(users), targets.select(users))


def _distinct(items: Jagged, num_items: int) -> Jagged:
    """Each item of a row once, in ascending order."""
    keys = torch.unique(items.rows * num_items + items.values)
    lengths = torch.bincount(keys // num_items, minlength=items.num_rows)
    return Jagged.from_lengths(keys % num_items, lengths)


@torch.no_grad()
def rank_targets(
    scorer: Scorer, asked: HeldOut, num_items: int, ranks: Ranks, batch_size: int
) -> Jagged:
    """Ranks from 1 of every target, U rows; equal scores rank by dense item id.

    Every rank calls it, with the same users, and gets the same answer.

    Raises:
        ValueError: scores that are not finite, which no rank can be read from.
    """
    begin, end = ranks.part_of(num_items)
    counted: list[Tensor] = []
    for rows in torch.arange(len(asked.users)).split(batch_size):
        scores = scorer(asked.users[rows])
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("evaluate: the model's scores are not finite; train it again")
        seen = asked.seen.select(rows).to(scores.device)
        targets = asked.targets.select(rows).to(scores.device)
        row, item = targets.rows, targets.values - begin
        is_held = (item >= 0) & (item < end - begin)
        own = scores.new_zeros(len(row))
        own[is_held] = scores[row[is_held], item[is_held]]
        own = sum_over_ranks(own)
        _hide(scores, seen, begin)
        scores[row[is_held], item[is_held]] = own[is_held]  # a target is a candidate though seen
        # Targets of long rows are taken in pieces of about the block's size.
        ahead = [
            _count_ahead(scores[r], o.unsqueeze(1), i)
            for r, o, i in zip(
                row.split(batch_size), own.split(batch_size), item.split(batch_size), strict=True
            )
        ]
        counted.append((sum_over_ranks(torch.cat(ahead)) + 1).cpu())
    return asked.targets.with_values(torch.cat(counted))


def _count_ahead(scores: Tensor, own: Tensor, item: Tensor) -> Tensor:
    """(T,) int64: items of this range that stand before the target. scores (T, N_r), item (T,)."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    is_tied_before = (scores == own) & (columns < item.unsqueeze(1))
    return ((scores > own) | is_tied_before).sum(1)


def _hide(scores: Tensor, seen: Jagged, begin: int) -> None:
    item = seen.values - begin
    is_held = (item >= 0) & (item < scores.shape[1])
    scores[seen.rows[is_held], item[is_held]] = -torch.inf


class ModelScorer:
    """Scores a block of users against this rank's range of the catalogue.

    Args:
        history: what each user took before, the rows of all users.
    """

    def __init__(self, backbone: Transformer, history: Jagged, ranks: Ranks) -> None:
        self.users = UserEncoder(backbone, history, ranks)
        begin, end = ranks.part_of(backbone.items.num_items)
        with torch.no_grad():
            self.keys = backbone.encode_items(backbone.items.rows(begin, end))

    def __call__(self, users: Tensor) -> Tensor:
        return self.users(users) @ self.keys.T


class UserEncoder:
    """(B,) users -> (B, D) vectors on every rank; each rank encodes its part of the block."""

    def __init__(self, backbone: Transformer, history: Jagged, ranks: Ranks) -> None:
        self.backbone = backbone
        self.history = history
        self.ranks = ranks

    @torch.no_grad()
    def __call__(self, users: Tensor) -> Tensor:
        begin, end = self.ranks.part_of(len(users))
        history = self.history.select(users[begin:end]).to(self.ranks.device)
        return gather_rows(encode_histories(self.backbone, history))


@torch.no_grad()
def encode_histories(backbone: Transformer, history: Jagged) -> Tensor:
    """(R, D) user vectors from R rows of item ids, of which the newest are read."""
    history = history.tail(backbone.history_length)
    vectors = backbone.items(lookup_ids(history.values))
    return backbone.encode_users(history.with_values(vectors))


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
        _hide(scores, seen.to(scores.device), begin)
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    if dist.get_world_size() == 1:
        return best.indices, best.values
    ids = gather_rows((best.indices + begin).T.contiguous()).T
    values = gather_rows(best.values.T.contiguous()).T
    merged = values.topk(min(k, values.shape[1]), dim=1)
    return ids.gather(1, merged.indices), merged.values
