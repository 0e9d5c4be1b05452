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

# Of the graph: neighbours of a node, and candidates kept while one is put in. Of a search: the
# candidates kept, at least 2 k.
NUM_NEIGHBOURS, WIDTH_OF_BUILD, WIDTH_OF_SEARCH = 32, 100, 128
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

    It may miss some of the best; what it finds has its true score. Where a filter leaves few
    candidates they are searched exactly.
    """

    def __init__(self, vectors: Tensor, exact: Retrieval) -> None:
        """Args:
        vectors: (N, D) float32 on the CPU whose inner products with queries are the scores.
        """
        import faiss

        self._exact = exact
        self._num_items = len(vectors)
        self._index = faiss.IndexHNSWFlat(
            vectors.shape[1], NUM_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT
        )
        self._index.hnsw.efConstruction = WIDTH_OF_BUILD
        self._index.add(vectors.numpy())

    def search(
        self, queries: Tensor, k: int, seen: Jagged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if allowed is not None and float(allowed.float().mean()) < FEWEST_ALLOWED:
            return self._exact.search(queries, k, seen, allowed)
        k = min(k, self._num_items)
        if seen is None and allowed is None:
            return self._walk(queries, k, None)
        if allowed is None:
            allowed = torch.ones(self._num_items, dtype=torch.bool)
        bits = np.packbits(allowed.numpy(), bitorder="little")
        found = []
        for row, query in enumerate(queries.split(1)):
            own = bits.copy()
            if seen is not None:
                _clear(own, seen.values[seen.offsets[row] : seen.offsets[row + 1]].numpy())
            found.append(self._walk(query, k, own))
        ids, scores = zip(*found, strict=True)
        return torch.cat(ids), torch.cat(scores)

    def _walk(
        self, queries: Tensor, k: int, bits: npt.NDArray[np.uint8] | None
    ) -> tuple[Tensor, Tensor]:
        """Args:
        bits: of the candidates, the first item's the lowest; None: all items.
        """
        import faiss

        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        width = max(WIDTH_OF_SEARCH, 2 * k)
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=width)
        scores, ids = self._index.search(queries.numpy(), k, params=parameters)
        is_found = torch.from_numpy(ids) >= 0
        scores = torch.from_numpy(scores).masked_fill(~is_found, -torch.inf)
        return torch.from_numpy(ids).clamp(min=0), scores


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


def _clear(bits: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64]) -> None:
    np.bitwise_and.at(bits, ids >> 3, ~(np.uint8(1) << (ids & 7).astype(np.uint8)))
