"""Dropout by hashes of bits that belong to a row (csrc/dropout): nobody holds its mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrec_pt.rng import key, mix


def dropout(x: Tensor, p: float, token_bits: Tensor, site: int) -> Tensor:
    """Zero elements of x with probability p and scale the rest by 1 / (1 − p).

    Args:
        x: (T, D), D a multiple of 4.
        p: at least 0, below 1; rounded to a multiple of 2^-16.
        token_bits: (T,) int64 from `RowNoise.token_bits`.
        site: tells apart the dropouts that share these tokens.
    """
    arguments = (x, token_bits, key("dropout", site), round(p * 65536))
    if x.device.type == "cpu":
        dropped: Tensor = torch.ops.torchrec_pt.row_dropout(*arguments)
        return dropped
    return dropout_by_tensors(*arguments)


def dropout_by_tensors(x: Tensor, token_bits: Tensor, site_key: int, threshold: int) -> Tensor:
    """The same bits by tensor arithmetic, on any device."""
    columns = torch.arange(x.shape[1] // 4, device=x.device)
    words = mix((token_bits + site_key).unsqueeze(1) + columns)
    keep = (words.view(torch.int16) >= threshold - 32768).to(x.dtype)  # four lots a word
    return x * keep.mul_(65536 / (65536 - threshold))


@torch.library.register_fake("torchrec_pt::row_dropout")
def _fake(x: Tensor, token_bits: Tensor, site_key: int, threshold: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, token_bits, ctx.site_key, ctx.threshold = inputs
    ctx.save_for_backward(token_bits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (token_bits,) = ctx.saved_tensors
    back = torch.ops.torchrec_pt.row_dropout(grad, token_bits, ctx.site_key, ctx.threshold)
    return back, None, None, None


torch.library.register_autograd("torchrec_pt::row_dropout", _backward, setup_context=_setup_context)
