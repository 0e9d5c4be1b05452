"""The item that goes best with each item, by the histories of training.

Memory-based correlation, as CoSeRec has it (Liu et al. 2021, section 3.2): the cosine
n_ij / √(n_i n_j), where n_i counts the histories that have item i, and n_ij those where i and j
stand within WINDOW places of each other. CoSeRec counts whole histories and damps a long one by the
logarithm of its length; with a window a history of n items has at most 10 n pairs, not n²/2, so
that neither its vote nor the memory of the counts grows with its square.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import gather_objects, sum_over_ranks

WINDOW = 5
# Interactions whose neighbours are counted at once: 10 pairs each, which take about 0.4 GB.
BLOCK = 2**19


def most_correlated(histories: Jagged, item_counts: Tensor) -> Tensor:
    """The most correlated other item of each; all ranks call it and get the same.

    Counts are whole numbers and added up over ranks, so that the result is exact for any number of
    them. Held at once are the pairs of a block of items, which has one item at least.

    Args:
        histories: item ids of this rank's users, in time order.
        item_counts: (num_items,) int64, interactions of each item, of all ranks' users.
    Returns:
        (num_items,) int64: of equally correlated ones the lowest id; an item that stood beside no
        other, itself.
    """
    num_items = len(item_counts)
    taken = torch.bincount(histories.to_sets().values, minlength=num_items)
    num_histories = sum_over_ranks(taken).numpy()
    found = []
    by_item, order = histories.values.sort(stable=True)
    first = 0
    for size in _block_sizes(item_counts):
        begin, end = torch.searchsorted(by_item, torch.tensor([first, first + size])).tolist()
        own = _count_neighbours(histories, order[begin:end].sort().values, first, size, num_items)
        found.append(_best_of_each(sum(gather_objects(own)), num_histories))
        first += size
    best = torch.from_numpy(np.concatenate(found))
    return torch.where(best < 0, torch.arange(num_items), best)


def _block_sizes(item_counts: Tensor) -> list[int]:
    """Numbers of consecutive items with about BLOCK interactions together."""
    before = item_counts.cumsum(0) - item_counts
    sizes: list[int] = (before // BLOCK).unique_consecutive(return_counts=True)[1].tolist()
    return sizes


def _count_neighbours(
    histories: Jagged, places: Tensor, first: int, size: int, num_items: int
) -> scipy.sparse.csr_matrix:
    """(size, num_items) int64: histories where items first, … and each other one are near.

    Args:
        places: (P,) int64, ascending, the entries of `histories` that hold items first, ….
    """
    shifts = torch.tensor([shift for shift in range(-WINDOW, WINDOW + 1) if shift])
    near = places[:, None] + shifts
    row = torch.searchsorted(histories.offsets, places, right=True)[:, None] - 1
    is_near = (near >= histories.offsets[row]) & (near < histories.offsets[row + 1])
    other = histories.values[near.clamp(0, len(histories.values) - 1)]
    item = histories.values[places][:, None]
    is_near &= other != item
    pair = ((item - first) * num_items + other)[is_near]
    row = row.expand_as(near)[is_near]
    # A history counts once. Rows ascend, and still do among those of a pair after a stable sort.
    order = pair.argsort(stable=True)
    pair, row = pair[order], row[order]
    is_first = torch.ones_like(pair, dtype=torch.bool)
    is_first[1:] = (pair.diff() != 0) | (row.diff() != 0)
    pair, count = pair[is_first].unique_consecutive(return_counts=True)
    begins = torch.searchsorted(pair // num_items, torch.arange(size + 1))
    table = (count.numpy(), (pair % num_items).numpy(), begins.numpy())
    return scipy.sparse.csr_matrix(table, shape=(size, num_items))


def _best_of_each(together: scipy.sparse.csr_matrix, num_histories: np.ndarray) -> np.ndarray:
    """(size,) int64, the column of each row whose cosine is largest; −1 for an empty row."""
    together.sort_indices()
    # n_ij² / n_j: the square of the cosine but for n_i; equal fractions are equal numbers.
    score = together.data.astype(np.float64) ** 2 / num_histories[together.indices]
    lengths = np.diff(together.indptr)
    begins = together.indptr[:-1][lengths > 0]
    largest = np.maximum.reduceat(score, begins).repeat(lengths[lengths > 0])
    is_best = np.flatnonzero(score == largest)
    winners = np.full(len(lengths), -1)
    winners[lengths > 0] = together.indices[is_best[np.searchsorted(is_best, begins)]]
    return winners
