"""What held-out interactions say: ranks over the full catalogue, predictions of pairs.

Users come in blocks, and each rank scores a block against its own range of the
catalogue; only counts travel. Nothing of users × items is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, gather_rows, sum_over_ranks
from torchrec_pt.learner import Learner
from torchrec_pt.scoring import Scorer, embed, hide
from torchrec_pt.tasks.pairs import Asked, PairTask


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
        scores = scorer(asked.users[rows]).to(ranks.device)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("ranking: the model's scores are not finite; lower the learning rate")
        seen = asked.seen.select(rows).to(scores.device)
        targets = asked.targets.select(rows).to(scores.device)
        row, item = targets.rows, targets.values - begin
        is_held = (item >= 0) & (item < end - begin)
        own = scores.new_zeros(len(row))
        own[is_held] = scores[row[is_held], item[is_held]]
        own = sum_over_ranks(own)
        hide(scores, seen, begin)
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


@torch.no_grad()
def predict_pairs(
    learner: Learner, task: PairTask, asked: Asked, ranks: Ranks, batch_size: int
) -> Tensor:
    """(P,) float32 predictions of every asked target, in order, on every rank.

    Each rank predicts its part of a block; all call it with the same `asked`.

    Raises:
        ValueError: predictions that are not finite.
    """
    found: list[Tensor] = []
    for block in torch.arange(len(asked.users)).split(batch_size):
        begin, end = ranks.part_of(len(block))
        mine = asked.select(block[begin:end])
        found.append(gather_rows(_predict(learner, task, mine, ranks)).cpu())
    predictions = torch.cat(found)
    if not bool(torch.isfinite(predictions).all()):
        raise ValueError(f"{task.name}: predictions are not finite; lower the learning rate")
    return predictions


def _predict(learner: Learner, task: PairTask, asked: Asked, ranks: Ranks) -> Tensor:
    drawn = embed(learner.backbone.items, task.draw_asked(asked), ranks.device)
    return task.predict(learner.backbone, drawn, asked.users.to(ranks.device))
