"""Tables of a byte an element."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_pt.int8 import dequantized, quantized


@given(
    num_rows=st.integers(0, 5),
    dim=st.integers(1, 40),
    size=st.floats(1e-6, 1e6),
    seed=st.integers(0, 99),
)
def test_an_element_is_at_most_half_a_step_off(
    num_rows: int, dim: int, size: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(num_rows, dim, generator=draw)
    rows = quantized(weight)
    assert rows.codes.dtype == torch.uint8
    assert rows.codes.shape == weight.shape
    # Beside half a step FBGEMM's 1e-8 of the range, and the rounding of s · c + b.
    allowed = 0.5 * rows.scale + 1.1e-8 + 1e-6 * weight.abs().amax(1, keepdim=True)
    assert bool(((dequantized(rows) - weight).abs() <= allowed).all())
