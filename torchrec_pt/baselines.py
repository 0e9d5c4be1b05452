"""What a model must beat: popularity and item-kNN, as scorers."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import gather_objects


class Popularity:
    """Every user gets the items in order of their training count (num_items,)."""

    def __init__(self, item_counts: Tensor) -> None:
        self._counts = item_counts.float()

    def queries(self, users: Tensor) -> Tensor:
        return users.new_zeros(len(users), 0)

    def scores(self, queries: Tensor, items: range) -> Tensor:
        return self._counts[items.start : items.stop].repeat(len(queries), 1)


class ItemKnn:
    """Sum of cosine similarities to the items of the history (Sarwar et al. 2001).

    Args:
        train: this rank's users' training items; similarities are those of all ranks' users.
        history: this rank's users' items at the time of asking.
        k: nearest neighbours that an item keeps, itself among them (as `implicit` counts).
    """

    def __init__(self, train: Jagged, history: Jagged, num_items: int, k: int = 20) -> None:
        self._history = history
        self._num_items = num_items
        taken = _binary_matrix(train, num_items)
        together = sum(gather_objects((taken.T @ taken).tocsr()))
        unit = scipy.sparse.diags(1 / np.sqrt(np.maximum(together.diagonal(), 1)))
        self._similar = _strongest_in_row((unit @ together @ unit).tocsr(), k).tocsc()

    def queries(self, users: Tensor) -> Jagged:
        return self._history.select(users)

    def scores(self, queries: Jagged, items: range) -> Tensor:
        similar = self._similar[:, items.start : items.stop]
        asked = _binary_matrix(queries.to(torch.device("cpu")), self._num_items)
        return torch.from_numpy((asked @ similar).toarray()).float()


def _binary_matrix(jagged: Jagged, num_items: int) -> scipy.sparse.csr_matrix:
    shape = (jagged.num_rows, num_items)
    ones = np.ones(len(jagged.values))
    matrix = scipy.sparse.csr_matrix(
        (ones, jagged.values.numpy(), jagged.offsets.numpy()), shape=shape
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _strongest_in_row(matrix: scipy.sparse.csr_matrix, k: int) -> scipy.sparse.csr_matrix:
    """Only the k largest entries of each row, none of them dropped where a row has fewer."""
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, row))
    place = np.arange(len(order)) - matrix.indptr[row[order]]
    kept = order[place < k]
    return scipy.sparse.csr_matrix(
        (matrix.data[kept], (row[kept], matrix.indices[kept])), shape=matrix.shape
    )
