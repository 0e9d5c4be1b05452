"""What is true of negatives on CUDA alone; test_operators.py runs it in the executor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.ops import NegativeSampler


@pytest.mark.parametrize("row", [-1, 2**32])
def test_a_row_number_that_is_no_word_stops_the_kernel(row: int) -> None:
    with pytest.raises(RuntimeError, match="trap"):
        NegativeSampler(5, 3).sample(torch.tensor([0, row]), step=0)


@pytest.mark.parametrize(
    ("values", "offsets"),
    [
        ([2, 1], [0, 2]),
        ([2, 2], [0, 2]),
        ([5], [0, 1]),
        ([-1], [0, 1]),
        ([0, 1, 2, 3, 4], [0, 5]),
        ([1], [0, 2]),
        ([1], [-1, 1]),
    ],
)
def test_exclusions_that_are_none_stop_the_kernel(values: list[int], offsets: list[int]) -> None:
    exclude = Jagged(torch.tensor(values), torch.tensor(offsets))
    with pytest.raises(RuntimeError, match="trap"):
        NegativeSampler(5, 3).sample(1, step=0, exclude=exclude)


@pytest.mark.parametrize("counts", [None, torch.arange(1, 301)])
def test_draws_beyond_one_block_of_threads(counts: Tensor | None) -> None:
    distribution = "uniform" if counts is None else "unigram"
    sampler = NegativeSampler(300, 1001, distribution=distribution, counts=counts)  # type: ignore[arg-type]
    whole = sampler.sample(3, step=0)
    for row in range(3):
        alone = sampler.sample(torch.tensor([row]), step=0)
        assert torch.equal(whole.ids[row], alone.ids[0])
        assert torch.equal(whole.log_q[row], alone.log_q[0])
