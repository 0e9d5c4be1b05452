"""What a query is set against besides its positive, and how often each item is expected there.

The logit of a negative is lowered by the log of how often its item is expected among the
negatives; the sum of their exponentials then estimates that over the catalogue without bias
(Bengio and Senécal 2008, section III; Yi et al. 2019, section 4). Where negatives come from several
sources, the expected counts add up. The positive, which is always there, is left uncorrected, and
a negative that is the positive's item is masked, whichever source it comes from.

Shared by all rows: keys of `gathered_infonce_loss` or `ring_infonce_loss`, those of all ranks.
    InBatch   the positives of the other rows    num_others · the item's share of training
    Sampled   num_negatives drawn for all        num_negatives · q
    Named     hard ones that the caller gives    how often the item is named
Of each row: for `sampled_softmax_loss`.
    NegativeSampler.sample                       num_negatives · q
    sample_beside   hard ones and drawn ones     1 for the hard ones, which are not drawn again
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.global_negatives import Keys
from torchrec_pt.ops.negatives import NegativeSampler, SampledNegatives


class Source(Protocol):
    def log_expected_count(self, ids: Tensor) -> Tensor:
        """(N,) float: the log of how often each of these items (N,) is expected of the source."""


@dataclass(frozen=True)
class InBatch:
    """The positives of the other rows of a batch, drawn as items are in training.

    Attributes:
        log_share: (num_items,) log of each item's share of the training interactions.
        num_others: 0-dim, rows of the batch but one, over all ranks.
    """

    log_share: Tensor
    num_others: Tensor

    def log_expected_count(self, ids: Tensor) -> Tensor:
        return self.log_share[ids] + self.num_others.log()


@dataclass(frozen=True)
class Sampled:
    """What `sampler.sample_shared` draws with replacement and without exclusions."""

    sampler: NegativeSampler

    def log_expected_count(self, ids: Tensor) -> Tensor:
        return self.sampler.log_q(ids)


@dataclass(frozen=True)
class Named:
    """Hard negatives given by the caller; they are certain.

    Attributes:
        ids: (T,) int64, those of all ranks (`gather_rows`).
    """

    ids: Tensor

    def log_expected_count(self, ids: Tensor) -> Tensor:
        ordered = self.ids.sort().values
        after = torch.searchsorted(ordered, ids, right=True)
        return (after - torch.searchsorted(ordered, ids)).float().log()


def join_keys(parts: Sequence[tuple[Tensor, Tensor]], sources: Sequence[Source]) -> Keys:
    """The keys of several sources as one set, each corrected by its expected count in all.

    Args:
        parts: (vectors (N, D), ids (N,)) of this rank, the positives first.
        sources: of all parts.
    """
    ids = torch.cat([part_ids for _, part_ids in parts])
    logs = [source.log_expected_count(ids) for source in sources]
    vectors = torch.cat([part_vectors for part_vectors, _ in parts])
    return Keys(vectors, ids=ids, log_q=functools.reduce(torch.logaddexp, logs))


def sample_beside(
    named: Jagged, sampler: NegativeSampler, rows: int | Tensor, *, step: int
) -> SampledNegatives:
    """Of each row its hard negatives, and sampled ones that are none of these.

    Args:
        named: R rows of item ids, of any order and number; repeats count once.
        rows, step: as in `NegativeSampler.sample`.
    Returns:
        (R, H + M), H the most that a row names; where a row names fewer, log_q is +inf, which
        removes an entry.
    Raises:
        ValueError: a row names every item.
    """
    named = named.to_sets()
    drawn = sampler.sample(rows, step=step, exclude=named)
    num_columns = int(named.lengths.max()) if named.num_rows else 0
    ids = drawn.ids.new_zeros((named.num_rows, num_columns))
    log_q = drawn.log_q.new_full(ids.shape, torch.inf)
    ids[named.rows, named.positions] = named.values
    log_q[named.rows, named.positions] = 0.0
    return SampledNegatives(torch.cat([ids, drawn.ids], 1), torch.cat([log_q, drawn.log_q], 1))
