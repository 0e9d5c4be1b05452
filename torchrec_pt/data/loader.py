"""The order in which users are trained on, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchrec_pt import rng
from torchrec_pt.data.batch import Rows, rows_of_users
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks

# Users are shuffled, cut into chunks of so many batches, and sorted by length inside a chunk:
# the padding of a batch shrinks while its users still vary from epoch to epoch.
BATCHES_PER_CHUNK = 16


class HistoryLoader:
    """Global batches of users' histories, dealt to ranks row by row.

    Args:
        histories: training items of every user, in time order.
        batch_size: rows of a global batch, over all ranks together.
        max_length: histories longer than this count as this long when sorting.
    """

    def __init__(
        self, histories: Jagged, *, batch_size: int, max_length: int, seed: int, ranks: Ranks
    ) -> None:
        self.histories = histories
        self.users = torch.nonzero(histories.lengths > 0).squeeze(1)
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = ranks
        self._capped_lengths = histories.lengths.clamp(max=max_length)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.users) // self.batch_size)

    def epoch(self, epoch: int) -> list[Tensor]:
        """The global batches of one epoch: (≤ batch_size,) user ids each."""
        order = self.users[rng.permutation(len(self.users), self.seed, "epoch", epoch)]
        chunk = torch.arange(len(order)) // (self.batch_size * BATCHES_PER_CHUNK)
        longest = int(self._capped_lengths.max()) + 1
        by_length = chunk * longest + self._capped_lengths[order]
        batches = order[torch.argsort(by_length, stable=True)].split(self.batch_size)
        deal = rng.permutation(len(batches), self.seed, "batches", epoch)
        return [batches[index] for index in deal.tolist()]

    def steps(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        """This rank's rows of every step of an epoch, from its step `start` on."""
        first_step = epoch * self.steps_per_epoch
        for index, users in enumerate(self.epoch(epoch)[start:], start):
            yield self._my_rows(users, first_step + index)

    def _my_rows(self, users: Tensor, step: int) -> Rows:
        rank, world_size = self.ranks.rank, self.ranks.world_size
        rows_per_rank = -(-len(users) // world_size)
        rows = torch.arange(rows_per_rank) * world_size + rank
        is_real = rows < len(users)
        mine = torch.full_like(rows, -1)
        mine[is_real] = users[rows[is_real]]
        return Rows(
            users=mine,
            noise=rng.RowNoise(self.seed, step, rows),
            weight=is_real.float(),
            histories=rows_of_users(self.histories, mine),
        )
