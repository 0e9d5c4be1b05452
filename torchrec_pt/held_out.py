"""What held-out interactions say: ranks over the full catalogue and among candidates, lists, pairs.

Users come in blocks. A rank encodes its own users; their vectors, seen items and targets travel,
and each rank scores them against its own range of the catalogue, block by block. Of users × items
no more is held than one block of users against MOST_KEPT_BLOCKS blocks of items. What a rank
finds about its users stays there until `gather_by_user`. Everything has the same bits for any
number of ranks (`scoring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, gather_each, gather_integers, sum_over_ranks
from torchrec_pt.learner import Learner
from torchrec_pt.scoring import (
    BestItems,
    ByItem,
    Query,
    Scorer,
    embed,
    gather_blocks,
    item_blocks,
    own_items,
    row_blocks,
)
from torchrec_pt.tasks.asked import Asked
from torchrec_pt.tasks.pairs import PairTask

MOST_KEPT_BLOCKS = 128  # of scores, from the search for the targets to the count
TARGETS_AT_A_TIME = 4096


@dataclass(frozen=True)
class HeldOut:
    """Who is asked, what they may not be offered, and what they took.

    Attributes:
        users: (U,) int64 users of this rank with at least one target.
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
    targets = dataset.targets(split).to_sets()
    users = torch.nonzero(targets.lengths > 0).squeeze(1)
    seen = dataset.history("train" if split == "valid" else "valid")
    return HeldOut(users, seen.select(users), targets.select(users))


@torch.no_grad()
def rank_targets(
    scorer: Scorer[Query],
    asked: HeldOut,
    parts: Tensor,
    num_items: int,
    ranks: Ranks,
    batch_size: int,
) -> Jagged:
    """Ranks from 1 of every target of this rank's users; equal scores rank by dense item id.

    Every rank calls it, for its own users.

    Args:
        parts: (U,) int64, ascending, the part of the dataset that each asked user belongs to.
        batch_size: users that are scored at a time.
    Raises:
        ValueError: scores that are not finite, which no rank can be read from.
    """
    return rank_and_list(scorer, asked, parts, num_items, ranks, batch_size).ranks


@dataclass(frozen=True)
class Ranked:
    """What the scores of U users of this rank say.

    Attributes:
        ranks: U rows, those of `rank_targets`.
        among: U rows, the ranks that each target has among its own candidates.
        lists: U rows of items, the first k of the list that `ranks` are of.
    """

    ranks: Jagged
    among: Jagged
    lists: Jagged


@torch.no_grad()
def rank_and_list(
    scorer: Scorer[Query],
    asked: HeldOut,
    parts: Tensor,
    num_items: int,
    ranks: Ranks,
    batch_size: int,
    *,
    candidates: Jagged | None = None,
    k: int = 0,
) -> Ranked:
    """The ranks of `rank_targets`, those among candidates, and what each user is offered.

    Every score is computed once for all of them.

    Args:
        candidates: one row a target, in their order, of distinct items, seen or not; the target
            itself does not count. None: there are none.
        k: items of each list; a user with fewer candidates has them all.
    """
    none = torch.zeros_like(asked.targets.values)
    candidates = candidates or Jagged.from_lengths(none[:0], none)
    items = own_items(num_items, ranks)
    places = asked.targets.with_values(torch.arange(len(asked.targets.values)))
    counted = [asked.targets.values.new_zeros(0, 2)]
    lists = [Jagged.from_lengths(none[:0], none[:0])]
    # Histories of like length share a block, since a block is padded to its longest.
    num_of_part = parts.unique_consecutive(return_counts=True)[1]
    order = Jagged.from_lengths(asked.seen.lengths, num_of_part).argsort()
    for rows in (order[block] for block in row_blocks(parts, batch_size, ranks)):
        blocks = zip(
            gather_blocks(scorer.queries(asked.users[rows]).to(ranks.device)),
            gather_blocks(asked.seen.select(rows).to(ranks.device)),
            gather_blocks(asked.targets.select(rows).to(ranks.device)),
            gather_blocks(candidates.select(places.select(rows).values).to(ranks.device)),
            strict=True,
        )
        found = [_rank_block(scorer, *block, items, k) for block in blocks]
        own_counted, best = found[ranks.rank]
        counted.append(own_counted.cpu())
        lists.append(best.lists().to(torch.device("cpu")))
    as_asked = order.argsort()
    counts = Jagged.from_lengths(torch.cat(counted), asked.targets.lengths[order]).select(as_asked)
    over_all, among = counts.values.unbind(1)
    with_values = asked.targets.with_values
    lists_as_asked = Jagged.stack(lists).select(as_asked)
    return Ranked(with_values(over_all), with_values(among), lists_as_asked)


def _rank_block(
    scorer: Scorer[Query],
    queries: Query,
    seen: Jagged,
    targets: Jagged,
    candidates: Jagged,
    items: range,
    k: int,
) -> tuple[Tensor, BestItems]:
    """Of one block of users, whom all ranks score together: (T, 2) int64 ranks, and their lists.

    The first rank of a target is over the catalogue, the second among its candidates.
    """
    row, item, blocks = targets.rows, targets.values, item_blocks(items)
    named = torch.cat([item, candidates.values])
    named_row = torch.cat([row, row[candidates.rows]])
    named_in = ByItem(Jagged.stack([targets, candidates])).within(blocks)
    named_scores = torch.zeros(len(named), device=row.device)
    kept: dict[int, Tensor] = {}
    for block, here in zip(blocks, named_in, strict=True):
        if len(here):
            scores = scorer.scores(queries, block).to(row.device)
            named_scores[here] = scores[named_row[here], named[here] - block.start]
            if len(kept) < MOST_KEPT_BLOCKS:
                kept[block.start] = scores
    own, others = sum_over_ranks(named_scores).split([len(item), len(candidates.values)])
    among = _count_candidates_ahead(own, others, item, candidates)

    hidden, best = ByItem(seen), BestItems(targets.num_rows, k, row.device)
    each_block = zip(blocks, hidden.within(blocks), ByItem(targets).within(blocks), strict=True)
    counts = row.new_zeros(len(row) + 1)  # items ahead of each target; blocks that are not finite
    have_one_each = bool((targets.lengths == 1).all())
    for block, seen_here, here in each_block:
        if block.start in kept:
            scores = kept.pop(block.start)
        else:
            scores = scorer.scores(queries, block).to(row.device)
        counts[-1] += ~torch.isfinite(scores.sum())  # as one that is not makes it
        hidden.hide(scores, block, seen_here)
        place = item[here] - block.start
        scores[row[here], place] = own[here]  # a candidate though seen
        if k:
            best.add(scores, block)
        counts[here] += _count_tied_before(scores[row[here]], own[here], place)
        for some in torch.arange(len(row), device=row.device).split(TARGETS_AT_A_TIME):
            of_target = scores if have_one_each else scores[row[some]]
            counts[some] += _count_ahead(of_target, own[some], item[some] >= block.stop)
    counts = sum_over_ranks(counts)
    if counts[-1]:
        raise ValueError("ranking: the model's scores are not finite; lower the learning rate")
    if k:
        best.merge_ranks()
    return torch.stack([counts[:-1], among], dim=1) + 1, best


def _count_ahead(scores: Tensor, own: Tensor, is_before: Tensor) -> Tensor:
    """(T,) int64: items of a block (T, N) ahead of a target that scores `own` (T,).

    Of the target's own block without equal scores: `_count_tied_before`.

    Args:
        scores: overwritten.
        is_before: (T,) bool, whether the block's items stand before the target where scores are
            equal.
    """
    below = torch.nextafter(own, torch.full_like(own, -torch.inf))
    bound = torch.where(is_before, below, own)
    return scores.gt_(bound.unsqueeze(1)).sum(1).long()  # of 0 and 1, which float32 sums exactly


def _count_tied_before(scores: Tensor, own: Tensor, place: Tensor) -> Tensor:
    """(T,) int64: equal scores in a block (T, N) before the target's at column `place` (T,)."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    return ((scores == own.unsqueeze(1)) & (columns < place.unsqueeze(1))).sum(1)


def _count_candidates_ahead(
    own: Tensor, scores: Tensor, item: Tensor, candidates: Jagged
) -> Tensor:
    """(T,) int64: candidates, of these scores, that stand before their target `item` (T,)."""
    target = candidates.rows
    is_tied_before = (scores == own[target]) & (candidates.values < item[target])
    is_ahead = (scores > own[target]) | is_tied_before
    return torch.zeros_like(item).index_add(0, target, is_ahead.long())


@torch.no_grad()
def predict_pairs(
    learner: Learner,
    task: PairTask,
    asked: Asked,
    parts: Tensor,
    ranks: Ranks,
    batch_size: int,
) -> Tensor:
    """(P,) float32 predictions of the asked targets of this rank, in order; all ranks call it.

    Args:
        parts: (R,) int64, ascending, the part of the dataset of each asked row.
    Raises:
        ValueError: predictions that are not finite.
    """
    predictions = torch.cat(
        [
            _predict(learner, task, asked.select(block), ranks).cpu()
            for block in row_blocks(parts, batch_size, ranks)
        ]
    )
    num_bad = int((~torch.isfinite(predictions)).sum())
    if any(num for (num,) in gather_integers([num_bad], ranks.device)):
        raise ValueError(f"{task.name}: predictions are not finite; lower the learning rate")
    return predictions


def _predict(learner: Learner, task: PairTask, asked: Asked, ranks: Ranks) -> Tensor:
    drawn = embed(learner.backbone, task.draw_asked(asked), ranks.device)
    return task.predict(learner.backbone, drawn, asked.users.to(ranks.device))


def gather_by_user(
    users: Tensor, values: Sequence[Jagged], ranks: Ranks
) -> tuple[Tensor, list[Jagged]]:
    """The rows of all ranks in the order of dense user ids, on every rank.

    Args:
        users: (R,) int64 dense ids, ascending; a user may have several rows.
        values: R rows each.
    """
    users = torch.cat(gather_each(users.to(ranks.device)))
    order = users.argsort(stable=True)
    gathered = [Jagged.stack(gather_blocks(each.to(ranks.device))) for each in values]
    cpu = torch.device("cpu")
    return users[order].to(cpu), [rows.select(order).to(cpu) for rows in gathered]
