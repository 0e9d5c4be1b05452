"""What a model must beat: popularity and item-kNN, as scorers of this rank's item range."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks
from torchrec_pt.scoring import Scorer


def popularity(item_counts: Tensor, ranks: Ranks) -> Scorer:
    """Every user gets the items in order of their training count."""
    begin, end = ranks.part_of(len(item_counts))
    counts = item_counts[begin:end].float()
    return lambda users: counts.repeat(len(users), 1)


def item_knn(train: Jagged, history: Jagged, num_items: int, ranks: Ranks, k: int = 20) -> Scorer:
    """Sum of cosine similarities to the items of the history (Sarwar et al. 2001).

    Args:
        train: users' training items, from which similarities are computed.
        history: users' items at the time of asking.
        k: nearest neighbours that an item keeps, itself among them (as `implicit` counts).
    """
    begin, end = ranks.part_of(num_items)
    taken = _binary_matrix(train, num_items)
    norm = np.sqrt(np.asarray(taken.sum(axis=0)).ravel())
    unit = (taken @ scipy.sparse.diags(1 / np.maximum(norm, 1))).tocsc()
    similar = _strongest_in_row((unit.T @ unit).tocsr(), k)[:, begin:end].tocsr()
    asked = _binary_matrix(history, num_items)

    def score(users: Tensor) -> Tensor:
        return torch.from_numpy((asked[users.numpy()] @ similar).toarray()).float()

    return score


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
