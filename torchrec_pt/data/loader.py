"""The order in which users are trained on, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt import rng
from torchrec_pt.data.batch import Rows, rows_of_users
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.splits import TRAIN
from torchrec_pt.distributed import Ranks

# The users of a part are shuffled, cut into chunks for so many batches, and sorted by length inside
# a chunk: the padding of a batch shrinks while its users still vary from epoch to epoch.
BATCHES_PER_CHUNK = 16


class HistoryLoader:
    """Global batches of users' training histories, each rank with its own users of them.

    Each part of the dataset is in an order of its own, and the global order takes one user of
    each part in turn (of the parts that have users left, the larger first). So a batch has users
    of all parts, hence of all ranks, and a rank knows where its users stand without the others'.

    Args:
        dataset: the parts of this rank.
        batch_size: rows of a global batch, over all ranks together.
        max_length: histories longer than this count as this long when sorting.
        with_impressions: users of whom training knows impressions alone have a turn, too, with an
            empty history.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        ranks: Ranks,
        with_impressions: bool = False,
    ) -> None:
        self.histories = dataset.history("train")
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = ranks
        self._capped_lengths = self.histories.lengths.clamp(max=max_length)
        trains = self.histories.lengths > 0
        if with_impressions:
            trains = dataset.interactions.filter(dataset.split == TRAIN).lengths > 0
        self._users = torch.nonzero(trains).squeeze(1)
        self._part_of_user = dataset.part_of_user[self._users]
        parts = dataset.manifest.parts
        self._sizes = torch.tensor(
            [part.num_training if with_impressions else part.num_taking for part in parts]
        )
        own = torch.bincount(self._part_of_user, minlength=len(self._sizes))
        self._begins = own.cumsum(0) - own  # of each part, in the order of an epoch
        self.num_users = int(self._sizes.sum())

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_users // self.batch_size)

    def steps(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        """This rank's rows of the steps of an epoch from `start` on, the batches shuffled.

        Ranks have equally many rows; missing ones are padded.
        """
        order = self._order(epoch)
        num_steps = self.steps_per_epoch
        batches = rng.permutation(num_steps, self.seed, "batches", epoch).tolist()
        for step in range(start, num_steps):
            begin = batches[step] * self.batch_size
            places = torch.arange(begin, min(begin + self.batch_size, self.num_users))
            part, index = self._at(places)
            rank = part % self.ranks.world_size
            is_mine = rank == self.ranks.rank
            users = order[self._begins[part[is_mine]] + index[is_mine]]
            missing = int(rank.bincount().max()) - len(users)
            users = F.pad(users, (0, missing), value=-1)
            rows = F.pad(places[is_mine] - begin, (0, missing), value=self.batch_size)
            yield Rows(
                users=users,
                noise=rng.RowNoise(self.seed, epoch * num_steps + step, rows),
                weight=(users >= 0).float(),
                histories=rows_of_users(self.histories, users),
            )

    def _order(self, epoch: int) -> Tensor:
        """This rank's users, part after part."""
        if not len(self._users):
            return self._users
        num_parts = int((self._sizes > 0).sum())
        per_chunk = max(1, self.batch_size * BATCHES_PER_CHUNK // num_parts)
        longest = int(self._capped_lengths.max()) + 1
        parts, sizes = self._part_of_user.unique_consecutive(return_counts=True)
        ordered = []
        for part, users in zip(parts.tolist(), self._users.split(sizes.tolist()), strict=True):
            users = users[rng.permutation(len(users), self.seed, "epoch", epoch, part)]
            chunk = torch.arange(len(users)) // per_chunk
            by_length = chunk * longest + self._capped_lengths[users]
            ordered.append(users[by_length.argsort(stable=True)])
        return torch.cat(ordered)

    def _at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of places (B,) in the global order, the part and the index in its order."""
        sizes, by_size = self._sizes.sort(descending=True, stable=True)
        # Before the part of the j-th smallest size runs out, one user of each is taken in turn.
        ends = F.pad(sizes.flip(0), (1, 0))
        num_left = torch.arange(len(sizes), 0, -1)
        before = F.pad((ends.diff() * num_left).cumsum(0), (1, 0))
        stretch = torch.searchsorted(before, places, right=True) - 1
        into = places - before[stretch]
        turns = num_left[stretch]
        return by_size[into % turns], ends[stretch] + into // turns
