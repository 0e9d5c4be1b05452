"""The bits of an operator on several numbers of threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_same_bits(
    run: Callable[[], Sequence[Tensor]], thread_counts: Sequence[int], *, by_blas: bool
) -> None:
    """What `run` gives on one thread it gives on others, to the last bit.

    Where the machine's BLAS splits a sum over the threads (MKL on Intel's processors does, where
    the result is small), an operator that calls it (`by_blas`) can do no better: to rounding then.
    """
    exactly = {"rtol": 0.0, "atol": 0.0}
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if by_blas and _blas_splits_sums() else exactly
    with _threads(1):
        first = run()
    for num_threads in thread_counts:
        with _threads(num_threads):
            for one, other in zip(first, run(), strict=True):
                torch.testing.assert_close(one, other, **tolerance)


@functools.cache
def _blas_splits_sums() -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes = [(m, k, n) for m in (44, 150, 256) for k in (130, 256, 512, 2100) for n in (40, 48)]
    for m, k, n in shapes:
        one, other = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        products = []
        for num_threads in (1, 2):
            with _threads(num_threads):
                products.append(one @ other)
        if not torch.equal(*products):
            return True
    return False


@contextmanager
def _threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
