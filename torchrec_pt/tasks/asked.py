"""Which user–item pairs are asked, and what was known of their users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.splits import SPLIT_CODES

MOST_TARGETS = 64  # more would make a block of rows, padded to the longest, large
NO_INTERACTION = -1
Context = Literal["before", "others"]


@dataclass(frozen=True)
class Asked:
    """Pairs to be judged, in rows of one user with the same history.

    Attributes:
        users: (R,) int64, of this rank; −1 for a padding row.
        known: the rows of interactions.parquet of every user that could be known, in time order.
        num_known: (R,) int64, how many of its user's are, the oldest.
        targets: R rows of the items (P) that are asked.
        interactions: (P,) int64 rows of interactions.parquet; NO_INTERACTION for a drawn item.
    """

    users: Tensor
    known: Jagged
    num_known: Tensor
    targets: Jagged
    interactions: Tensor

    def select(self, rows: Tensor) -> Asked:
        places = self.targets.with_values(torch.arange(len(self.interactions))).select(rows)
        return Asked(
            self.users[rows],
            self.known,
            self.num_known[rows],
            self.targets.select(rows),
            self.interactions[places.values],
        )

    def history(self, most: int) -> Jagged:
        """R rows of the newest known interactions, at most `most` each."""
        lengths = self.num_known.clamp(max=most)
        start = self.known.offsets[self.users.clamp(min=0)] + self.num_known - lengths
        return self.known.slices(start, lengths)


def held_out_pairs(
    dataset: PreparedDataset, split: Literal["valid", "test"], context: Context = "before"
) -> Asked:
    """Every interaction of `split`; its user's ones of the splits before it are known.

    Those with the same history share a row, up to MOST_TARGETS of them.

    Args:
        context: whether all of these are known, or only those before it in time.
    """
    code = SPLIT_CODES[split]
    rows = torch.arange(len(dataset.split))
    is_known = dataset.split < code
    known = dataset.interactions.with_values(rows).filter(is_known)
    num_known_before = is_known.cumsum(0) - is_known.long()
    asked = torch.nonzero(dataset.split == code).squeeze(1)
    user, before = dataset.interactions.rows[asked], num_known_before[asked]
    if context == "others":
        before = known.offsets[user + 1]
    key = user * (len(rows) + 1) + before
    _, counts = torch.unique_consecutive(key, return_counts=True)
    place = Jagged.from_lengths(asked, counts).positions
    piece = torch.stack([key, place // MOST_TARGETS])
    _, counts = torch.unique_consecutive(piece, dim=1, return_counts=True)
    targets = Jagged.from_lengths(dataset.interactions.values[asked], counts)
    first = targets.offsets[:-1]
    users = user[first]
    return Asked(users, known, before[first] - known.offsets[users], targets, asked)
