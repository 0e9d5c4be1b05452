"""Scores of users against the catalogue, each rank for its own range of items.

Everything is computed in blocks that the number of ranks does not change: users in blocks of one
part of the dataset, items in blocks of ITEM_BLOCK from the first on. A matrix product may round
differently with its shape; so a score has the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.data.batch import Draw, Embedded, lookup_ids
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, gather_each, gather_integers, sum_over_ranks
from torchrec_pt.learner import Learner
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.ranking_head import InnerHead
from torchrec_pt.tasks.ranking import RankingTask

ITEM_BLOCK = 1024
BLOCKS_PER_LOOKUP = 128
ITEMS_OF_A_GROUP = 8  # of a block, in a search for the best
FEWEST_ROWS = 16  # of histories encoded together: MKL rounds products of fewer in another way
SCORES_AT_A_TIME = 2**18  # of a search: they stay in the cache from one step to the next

Query = TypeVar("Query", Tensor, Jagged)


class Scorer(Protocol[Query]):
    """Asked in two steps, since users' histories and items' vectors lie on different ranks."""

    def queries(self, users: Tensor) -> Query:
        """One row for each of these users (B,) of this rank; all ranks call it together."""

    def scores(self, queries: Query, items: range) -> Tensor:
        """(B, len(items)) float32 of some of this rank's items, for the queries of any rank."""


class ModelScorer:
    """Inner products of users' and items' vectors, or what a head makes of the vectors.

    Args:
        history: what each user of this rank took before.
    """

    def __init__(
        self, backbone: Backbone, history: Jagged, ranks: Ranks, head: InnerHead | None = None
    ) -> None:
        self.backbone = backbone
        self.history = history
        self.head = head or InnerHead()
        self.device = ranks.device
        self._own = own_items(backbone.items.num_items, ranks)
        self.own_vectors = encode_own_items(backbone, ranks)

    def queries(self, users: Tensor) -> Tensor:
        history = self.history.select(users).to(self.device)
        return self.queries_after(users.to(self.device), history)

    @torch.no_grad()
    def queries_after(self, users: Tensor, history: Jagged) -> Tensor:
        """(R, Q) of users (R,), −1 for somebody unknown, after R rows of item ids."""
        return self.head.of_users(users, encode_histories(self.backbone, users, history))

    @torch.no_grad()
    def scores(self, queries: Tensor, items: range) -> Tensor:
        ids = torch.arange(items.start, items.stop, device=self.device)
        return self.head.of_block(queries, self.head.of_items(ids, self.own_vectors_of(items)))

    @torch.no_grad()
    def scores_of(self, queries: Tensor, ids: Tensor) -> Tensor:
        """(B, N) float32 of any items (N,) int64; all ranks call it with the same."""
        return self.head.of_block(queries, self.head.of_items(ids, self.vectors(ids)))

    def own_vectors_of(self, items: range) -> Tensor:
        """(len(items), D) of some of this rank's items."""
        return self.own_vectors[items.start - self._own.start : items.stop - self._own.start]

    def vectors(self, ids: Tensor) -> Tensor:
        """(N, D) of any items (N,) int64; all ranks call it with the same."""
        place = ids - self._own.start
        is_own = (place >= 0) & (place < len(self._own))
        vectors = self.own_vectors.new_zeros(len(ids), self.own_vectors.shape[1])
        vectors[is_own] = self.own_vectors[place[is_own]]
        return sum_over_ranks(vectors)


def head_of(learner: Learner) -> InnerHead:
    """What scores pairs of users and items: the ranking task's, or else the inner product."""
    heads = [task.head for task in learner.objectives.values() if isinstance(task, RankingTask)]
    return heads[0] if heads else InnerHead()


# --- blocks -------------------------------------------------------------------------------------


def own_items(num_items: int, ranks: Ranks) -> range:
    """The items that a rank scores: whole blocks; no rank has more than the first."""
    begin, end = ranks.part_of(-(-num_items // ITEM_BLOCK))
    return range(min(begin * ITEM_BLOCK, num_items), min(end * ITEM_BLOCK, num_items))


def item_blocks(items: range) -> list[range]:
    return [
        range(begin, min(begin + ITEM_BLOCK, items.stop))
        for begin in range(items.start, items.stop, ITEM_BLOCK)
    ]


def row_blocks(parts: Tensor, size: int, ranks: Ranks) -> list[Tensor]:
    """This rank's rows in blocks of at most `size`, all of one part; on every rank equally many.

    Args:
        parts: (R,) int64, ascending, the part of each row.
    Returns:
        (≤ size,) int64 each; empty at the end where other ranks have more.
    """
    rows = torch.arange(len(parts))
    sizes = parts.unique_consecutive(return_counts=True)[1].tolist()
    blocks = [block for part in rows.split(sizes or [0]) for block in part.split(size)]
    most = max(num for (num,) in gather_integers([len(blocks)], ranks.device))
    return blocks + [rows[:0]] * (most - len(blocks))


@overload
def gather_blocks(block: Tensor) -> list[Tensor]: ...
@overload
def gather_blocks(block: Jagged) -> list[Jagged]: ...
def gather_blocks(block: Tensor | Jagged) -> list[Tensor] | list[Jagged]:
    """The block of each rank, in rank order, on every rank."""
    if isinstance(block, Tensor):
        return gather_each(block)
    parts = zip(gather_each(block.values), gather_each(block.lengths), strict=True)
    return [Jagged.from_lengths(values, lengths) for values, lengths in parts]


# --- vectors ------------------------------------------------------------------------------------


@torch.no_grad()
def encode_own_items(backbone: Backbone, ranks: Ranks) -> Tensor:
    """(len(own_items), D) vectors; all ranks call it."""
    num_items, per_lookup = backbone.items.num_items, ITEM_BLOCK * BLOCKS_PER_LOOKUP
    items = own_items(num_items, ranks)
    vectors = []
    for begin in range(0, len(own_items(num_items, replace(ranks, rank=0))), per_lookup):
        some = items[begin : begin + per_lookup]
        vectors.append(encode_item_range(backbone, some.start, some.stop))
    return torch.cat(vectors)


@torch.no_grad()
def encode_item_range(backbone: Backbone, begin: int, end: int) -> Tensor:
    """(end − begin, D) vectors of consecutive items, in blocks; each rank asks for its own."""
    rows = backbone.items.rows(begin, end).detach()  # no_grad returns a whole weight as it is
    ids = torch.arange(begin, end, device=rows.device)
    blocks = zip(ids.split(ITEM_BLOCK), rows.split(ITEM_BLOCK), strict=True)
    return torch.cat(
        [backbone.encode_items(some, backbone.represent(some, rows)) for some, rows in blocks]
    )


@torch.no_grad()
def encode_histories(backbone: Backbone, users: Tensor, history: Jagged) -> Tensor:
    """(R, D) vectors of users (R,) from R rows of item ids, of which the newest are read.

    A user's has the same bits whoever is asked together.
    """
    num_rows, num_more = history.num_rows, max(0, FEWEST_ROWS - history.num_rows)
    ones = history.offsets.new_ones(num_more)  # histories of item 0 alone
    more = Jagged.from_lengths(torch.zeros_like(ones), ones)
    history = Jagged.stack([history.tail(backbone.history_length), more])
    vectors = look_up(backbone, history.values)
    users = F.pad(users, (0, num_more), value=-1)
    return backbone.encode_users(users, history.with_values(vectors))[:num_rows]


def look_up(backbone: Backbone, ids: Tensor) -> Tensor:
    """(T, D) represented rows of items (T,) int64; with a sharded table every rank calls."""
    rows, places = _look_up_distinct(backbone, ids)
    return F.embedding(places, rows)


def _look_up_distinct(backbone: Backbone, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Represented rows (U, D) of the distinct ones of items (T,), and (T,) which is whose."""
    distinct, places = ids.unique(return_inverse=True)
    return backbone.represent(distinct, backbone.items(lookup_ids(distinct))), places


def embed(backbone: Backbone, draw: Draw, device: torch.device) -> Embedded:
    """A draw with the rows of its ids looked up; with a sharded table every rank calls."""
    ids = {name: lookup.to(device) for name, lookup in draw.lookups.items()}
    each = [lookup.values for lookup in ids.values()]
    rows, places = _look_up_distinct(backbone, torch.cat(each))
    parts = places.split([len(some) for some in each])
    return Embedded(
        ids=ids,
        rows=rows,
        places={
            name: lookup.with_values(part)
            for (name, lookup), part in zip(ids.items(), parts, strict=True)
        },
        tensors={name: tensor.to(device) for name, tensor in draw.tensors.items()},
    )


# --- the best -----------------------------------------------------------------------------------


@torch.no_grad()
def top_items(
    scorer: Scorer[Query],
    queries: Query,
    seen: Jagged | None,
    k: int,
    num_items: int,
    ranks: Ranks,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best items of each query that are not in its row of `seen`.

    No more scores are held than SCORES_AT_A_TIME, or those of one block of items.

    Args:
        queries: B rows, the same on every rank.
        allowed: (num_items,) bool, which items are candidates; None: all.
    Returns:
        ids (B, k) int64 and scores (B, k) float32, best first; −inf where candidates ran out.
    """
    num_rows = len(queries) if isinstance(queries, Tensor) else queries.num_rows
    best = BestItems(num_rows, min(k, num_items), ranks.device)
    none = torch.zeros(num_rows, dtype=torch.int64)
    seen = Jagged.from_lengths(none[:0], none) if seen is None else seen
    hidden = ByItem(seen.to(ranks.device))
    refused = None if allowed is None else ~allowed.to(ranks.device)
    own, per_visit = own_items(num_items, ranks), SCORES_AT_A_TIME // max(num_rows, 1)
    size = max(1, per_visit // ITEM_BLOCK) * ITEM_BLOCK
    visits = [own[begin : begin + size] for begin in range(0, len(own), size)]
    for items, here in zip(visits, hidden.within(visits), strict=True):
        blocks = item_blocks(items)
        scores = torch.cat([scorer.scores(queries, block) for block in blocks], dim=1)
        scores = scores.to(ranks.device)
        hidden.hide(scores, items, here)
        if refused is not None:
            scores.masked_fill_(refused[items.start : items.stop], -torch.inf)
        best.add(scores, items)
    best.merge_ranks()
    return best.ids, best.scores


class BestItems:
    """The k best items of each row; equal scores by dense item id.

    An item is one integer: its score's place among all floats, and below it the id. The best
    are the largest then, and the same whichever blocks and ranks they come from.
    """

    def __init__(self, num_rows: int, k: int, device: torch.device) -> None:
        nothing = torch.full((num_rows, k), -torch.inf, device=device)
        self._best = _place(nothing) << 32  # behind any item

    def add(self, scores: Tensor, items: range) -> None:
        """Scores (B, len(items)) float32; −inf for what is no candidate."""
        k = self._best.shape[1]
        if not self._best.numel():
            return
        # Few groups of items have one as good as the k-th best; the others are not looked into.
        num_groups = -(-scores.shape[1] // ITEMS_OF_A_GROUP)
        padding = num_groups * ITEMS_OF_A_GROUP - scores.shape[1]
        grouped = F.pad(scores, (0, padding), value=-torch.inf) if padding else scores
        grouped = grouped.view(len(scores), ITEMS_OF_A_GROUP, num_groups)
        top = grouped.amax(1)
        least = self.scores[:, -1]
        if num_groups >= k and bool((least == -torch.inf).any()):
            least = torch.maximum(least, top.topk(k).values[:, -1])  # k groups have such items
        row, group = torch.nonzero(top >= least.unsqueeze(1)).unbind(1)
        hit, slot = torch.nonzero(grouped[row, :, group] >= least[row].unsqueeze(1)).unbind(1)
        row, column = row[hit], slot * num_groups + group[hit]
        if padding:
            is_item = column < scores.shape[1]
            row, column = row[is_item], column[is_item]
        if not len(row):
            return
        rows, num = row.unique_consecutive(return_counts=True)
        found = Jagged.from_lengths(_packed(scores[row, column], items.start + column), num)
        padded = self._best.new_full((len(rows), int(num.max())), torch.iinfo(torch.int64).min)
        padded[found.rows, found.positions] = found.values
        self._best[rows] = self._largest([self._best[rows], padded])

    def merge_ranks(self) -> None:
        """Of what all ranks added; every rank calls it."""
        self._best = self._largest(gather_each(self._best))

    @property
    def ids(self) -> Tensor:
        """(B, k) int64, best first; meaningless where the score is −inf."""
        return _LAST_ID - (self._best & _LAST_ID)

    @property
    def scores(self) -> Tensor:
        """(B, k) float32, best first; −inf where candidates ran out."""
        return _score(self._best >> 32)

    def lists(self) -> Jagged:
        """B rows of the ids whose scores are not −inf."""
        is_candidate = self.scores > -torch.inf
        return Jagged.from_lengths(self.ids[is_candidate], is_candidate.sum(1))

    def _largest(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1).topk(self._best.shape[1]).values


_LAST_ID = 2**32 - 1


def _packed(scores: Tensor, ids: Tensor) -> Tensor:
    """int64 that order as the scores, float32, and of equal ones the smaller id as the larger."""
    return (_place(scores) << 32) + (_LAST_ID - ids)


def _place(scores: Tensor) -> Tensor:
    """int64, in the range of int32, that order as float32 scores do; −0 and 0 are one."""
    return _flip_negative((scores + 0.0).view(torch.int32)).long()


def _score(places: Tensor) -> Tensor:
    return _flip_negative(places.int()).view(torch.float32)


def _flip_negative(bits: Tensor) -> Tensor:
    """The bits below the sign, which grow with the size of a negative float; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


class ByItem:
    """A jagged of items by item, so that a block of items finds its entries at once."""

    def __init__(self, items: Jagged) -> None:
        self._jagged, self._rows = items, items.rows
        self._ascending, self._order = items.values.sort()

    def within(self, blocks: Sequence[range]) -> list[Tensor]:
        """Of each block the places of the entries whose items it holds."""
        edges = self._ascending.new_tensor([[block.start, block.stop] for block in blocks])
        found = torch.searchsorted(self._ascending, edges.view(-1, 2)).tolist()
        return [self._order[begin:end] for begin, end in found]

    def hide(self, scores: Tensor, block: range, here: Tensor) -> None:
        """Of the entries `here`, those within the block, the scores (B, len(block)) become −inf."""
        scores[self._rows[here], self._jagged.values[here] - block.start] = -torch.inf
