"""Dropout by hashes: its rate, its lots, and the operator against tensor arithmetic.

Every bound is about five standard deviations of a sound generator; the draws are fixed by
their keys, so a test that passes once passes always.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchrec_pt.ops import dropout
from torchrec_pt.ops.dropout import dropout_by_tensors
from torchrec_pt.rng import RowNoise


def _bits(num_rows: int) -> Tensor:
    rows = torch.arange(num_rows)
    return RowNoise(0, 0, rows).token_bits("d", rows, rows)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (3, 4), (700, 64), (5, 260), (2, 768)])
@pytest.mark.parametrize("threshold", [0, 1, 13107, 32768, 65535])
def test_the_operator_has_the_bits_of_tensor_arithmetic(
    dtype: torch.dtype, shape: tuple[int, int], threshold: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    x[:, :2] = torch.tensor([-0.0, torch.inf]).to(dtype)
    arguments = (_bits(shape[0]), -(2**62) - 12345, threshold)
    got = torch.ops.torchrec_pt.row_dropout(x, *arguments)
    expected = dropout_by_tensors(x, *arguments)
    assert got.dtype == dtype
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    is_number = ~expected.isnan()  # 0 times infinity, whose sign nothing says
    assert torch.equal(got.isnan(), ~is_number)
    assert torch.equal(got.view(as_integers)[is_number], expected.view(as_integers)[is_number])


def test_the_operator_takes_what_is_not_contiguous_and_any_number_of_threads() -> None:
    x, bits = torch.randn(64, 4000).T, _bits(4000)
    expected = dropout(x.contiguous(), 0.3, bits, site=1)
    threads = torch.get_num_threads()
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            assert torch.equal(dropout(x, 0.3, bits, site=1), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_operator_registers_as_torch_wants_it() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.torchrec_pt.row_dropout, (x, _bits(6), 77, 20000))


@pytest.mark.parametrize(
    ("x", "bits", "names"),
    [
        (torch.ones(3, 6), torch.arange(3), "multiple of 4"),
        (torch.ones(12), torch.arange(12), r"\(T, D\)"),
        (torch.ones(3, 8), torch.arange(4), "token_bits"),
        (torch.ones(3, 8), torch.ones(3), "token_bits"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, bits: Tensor, names: str) -> None:
    with pytest.raises(RuntimeError, match=names):
        dropout(x, 0.5, bits, site=1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_scales_the_rest_and_passes_gradients_alike(p: float) -> None:
    num_rows, dim = 2048, 64
    x = (torch.rand(num_rows, dim) + 1).requires_grad_()
    bits = _bits(num_rows)
    out = dropout(x, p, bits, site=1)
    is_kept = out != 0
    # 131,072 lots; p is rounded to a multiple of 2^-16.
    deviation = (p * (1 - p) / out.numel()) ** 0.5
    assert abs(1 - float(is_kept.float().mean()) - p) < 5 * deviation + 2**-17
    scale = torch.where(is_kept, 1 / (1 - p), 0.0)
    torch.testing.assert_close(out, x * scale, rtol=1e-4, atol=0)  # that rounding of p
    out.sum().backward()
    torch.testing.assert_close(x.grad, scale, rtol=1e-4, atol=0)


def test_dropout_lots_are_unrelated_across_columns_tokens_and_sites() -> None:
    num_rows, dim = 4096, 8
    bits = _bits(num_rows)
    kept = dropout(torch.ones(num_rows, dim), 0.5, bits, site=1).sign()
    bound = 5 / num_rows**0.5
    columns = torch.corrcoef(kept.T.double()) - torch.eye(dim)
    assert columns.abs().max() < bound  # eight columns are two words of four lots
    assert abs(_correlation(kept[:, 0], kept[:, 0].roll(1))) < bound
    other_site = dropout(torch.ones(num_rows, dim), 0.5, bits, site=2).sign()
    assert abs(_correlation(kept[:, 0], other_site[:, 0])) < bound


def test_dropout_with_probability_zero_changes_nothing() -> None:
    x = torch.randn(5, 8)
    bits = torch.arange(5)
    assert torch.equal(dropout(x, 0.0, bits, site=1), x)
