"""How the best items are found: by every score, or by a graph over the item vectors (HNSW)."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks
from torchrec_pt.models.ranking_head import MlpHead
from torchrec_pt.scoring import ModelScorer, top_items

# Of the graph: neighbours of a node. Of a search: the items kept, at least twice as many as are
# asked for, four times with what was seen.
NUM_NEIGHBOURS, WIDTH_OF_SEARCH = 32, 256
# With fewer candidates than this share of the catalogue a graph's walk meets too few of them.
FEWEST_ALLOWED = 0.1


class Retrieval(Protocol):
    """Finds the k best items for each query: ids (B, k) int64 and scores (B, k), −inf where
    candidates ran out."""

    def search(
        self, queries: Tensor, k: int, seen: Jagged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Args:
        queries: (B, Q), the same on every rank.
        seen: B rows of items that are no candidates.
        allowed: (num_items,) bool, which items are candidates of all queries.
        """


class ExactSearch:
    """By the score of every item, whatever head makes it."""

    def __init__(self, scorer: ModelScorer, ranks: Ranks) -> None:
        self._scorer, self._ranks = scorer, ranks

    def search(
        self, queries: Tensor, k: int, seen: Jagged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        num_items = self._scorer.backbone.items.num_items
        return top_items(self._scorer, queries, seen, k, num_items, self._ranks, allowed)


class GraphSearch:
    """By a walk over a graph of the item vectors (HNSW, Malkov & Yashunin 2018), in faiss.

    Vectors get one more element that makes them all equally long; then the nearest to a query are
    those of the largest inner products (Bachrach et al. 2014), and neighbours are neighbours both
    ways, which those by inner products are not. The walk may miss some of the best; what it finds
    has its true score. Where a filter leaves few candidates they are searched exactly.
    """

    def __init__(self, vectors: Tensor, exact: Retrieval) -> None:
        """Args:
        vectors: (N, D) float32 on the CPU whose inner products with queries are the scores.
        """
        import faiss

        self._exact, self._vectors = exact, vectors
        squares = vectors.square().sum(1, keepdim=True)
        missing = (squares.max() - squares).sqrt()
        self._index = faiss.IndexHNSWFlat(vectors.shape[1] + 1, NUM_NEIGHBOURS)
        self._index.add(torch.cat([vectors, missing], dim=1).numpy())

    def search(
        self, queries: Tensor, k: int, seen: Jagged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if allowed is not None and float(allowed.float().mean()) < FEWEST_ALLOWED:
            return self._exact.search(queries, k, seen, allowed)
        k = min(k, len(self._vectors))
        if seen is None and allowed is None:
            return self._walk(queries, k, WIDTH_OF_SEARCH, None)
        if allowed is None:
            allowed = torch.ones(len(self._vectors), dtype=torch.bool)
        bits = np.packbits(allowed.numpy(), bitorder="little")
        found = []
        for row, query in enumerate(queries.split(1)):
            own, width = bits.copy(), WIDTH_OF_SEARCH
            if seen is not None:
                ids = seen.values[seen.offsets[row] : seen.offsets[row + 1]].numpy()
                np.bitwise_and.at(own, ids >> 3, ~(np.uint8(1) << (ids & 7).astype(np.uint8)))
                width = max(width, 4 * (k + len(ids)))
            found.append(self._walk(query, k, width, own))
        ids_, scores = zip(*found, strict=True)
        return torch.cat(ids_), torch.cat(scores)

    def _walk(
        self, queries: Tensor, k: int, width: int, bits: npt.NDArray[np.uint8] | None
    ) -> tuple[Tensor, Tensor]:
        """Args:
        bits: of the candidates, the first item's the lowest; None: all items.
        """
        import faiss

        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(width, 2 * k))
        _, found = self._index.search(F.pad(queries, (0, 1)).numpy(), k, params=parameters)
        ids = torch.from_numpy(found)
        scores = torch.einsum("bd,bkd->bk", queries, self._vectors[ids.clamp(min=0)])
        best = scores.masked_fill(ids < 0, -torch.inf).sort(dim=1, descending=True, stable=True)
        return ids.clamp(min=0).gather(1, best.indices), best.values


def build_retrieval(name: Literal["exact", "hnsw"], scorer: ModelScorer, ranks: Ranks) -> Retrieval:
    """Raises:
    ValueError: a graph is asked for, and the model has scores that are no inner products, or
        its items lie on several ranks or a GPU.
    """
    exact = ExactSearch(scorer, ranks)
    if name == "exact":
        return exact
    if name != "hnsw":
        raise ValueError(f'retrieval: must be "exact" or "hnsw", given "{name}"')
    if isinstance(scorer.head, MlpHead):
        raise ValueError(
            'retrieval: "hnsw" finds the largest inner products, and the model ranks by its mlp '
            'head; use "exact"'
        )
    if ranks.world_size > 1 or ranks.device.type != "cpu":
        raise ValueError(
            f'retrieval: "hnsw" is for one process on the CPU, given {ranks.world_size} on '
            f'{ranks.device}; use "exact"'
        )
    return GraphSearch(scorer.own_vectors, exact)


class Likeness:
    """Scores of items by the cosine of their vectors with queries (B, D) of length 1."""

    def __init__(self, scorer: ModelScorer) -> None:
        self._scorer = scorer

    def queries(self, users: Tensor) -> Tensor:
        """Vectors of items (B,), in place of users."""
        return F.normalize(self._scorer.vectors(users), dim=1)

    def scores(self, queries: Tensor, items: range) -> Tensor:
        return queries @ F.normalize(self._scorer.own_vectors_of(items), dim=1).T
