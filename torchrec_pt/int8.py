"""Embedding tables of one byte an element, by FBGEMM's row-wise quantization.

A row x becomes codes c = round((x − b) / s) in 0 … 255 with b = min x, s = (max x − min x) / 255,
and is read as s · c + b: at most s / 2 off an element, and 1e-8, which FBGEMM adds to the range.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
from torch import Tensor, nn

from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.models.item_table import ItemTable


class Int8Rows(NamedTuple):
    """Attributes:
    codes: (N, D) uint8.
    scale, bias: (N, 1) float32.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor


class TableBytes(NamedTuple):
    """What all embedding tables of a model take, before and after."""

    float32: int
    int8: int


def quantized(weight: Tensor) -> Int8Rows:
    """Of a table (N, D) float32 on the CPU."""
    fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(weight.detach().contiguous())
    codes, ends = fused.split([weight.shape[1], 8], dim=1)
    # A copy of its own, since a view as float32 must begin at a multiple of 4 bytes.
    scale, bias = ends.clone(memory_format=torch.contiguous_format).view(torch.float32).split(1, 1)
    return Int8Rows(codes.contiguous(), scale.contiguous(), bias.contiguous())


def dequantized(rows: Int8Rows) -> Tensor:
    """(N, D) float32."""
    return rows.codes.float() * rows.scale + rows.bias


@torch.no_grad()
def quantize_tables(model: nn.Module) -> TableBytes:
    """Give every table of a model (the items', those of features) the values that int8 leaves.

    The tables stay float32 tensors, so that whatever runs the model runs it as it is quantized;
    `programs` store the codes. The item table must not be sharded.
    """
    before = after = 0
    for weight in _tables(model):
        rows = quantized(weight)
        weight.copy_(dequantized(rows))
        before += weight.nbytes
        after += sum(part.nbytes for part in rows)
    return TableBytes(before, after)


def _tables(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, ItemTable):
            yield module.weight
        elif isinstance(module, FeatureEncoder) and module.tables is not None:
            yield from (bag.weight for bag in module.tables.embedding_bags.values())
