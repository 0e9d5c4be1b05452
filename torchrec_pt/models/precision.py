"""Mixed precision: the linear layers multiply in bfloat16, everything else stays float32.

Micikevicius et al. 2018 (Mixed Precision Training, section 3.1: float32 master weights), with
bfloat16, which has float32's range and needs no loss scaling (Kalamkar et al. 2019). Not
torch.autocast around a step: it would take the products inside the losses along, such as scores
and Gram matrices, unless every loss saw to it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# On a CPU oneDNN compiles a product anew for each number of rows, and no two steps have as many
# tokens; so there are a few numbers alone.
ROWS_MULTIPLE = 256


def multiply_in_bf16(module: nn.Module) -> None:
    """From now on every nn.Linear of `module` multiplies in bfloat16 while it trains.

    It then gives bfloat16, and what is made of that alone, such as attention, is bfloat16 as
    well. Parameters, their gradients and evaluation stay float32.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = _Bf16Linear


class _Bf16Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """(…, in) of any floating dtype -> (…, out), bfloat16 in training."""
        if not self.training:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.bfloat16()
        rows = input.bfloat16().flatten(0, -2)
        num_more = -len(rows) % ROWS_MULTIPLE if rows.device.type == "cpu" else 0
        padded = F.pad(rows, (0, 0, 0, num_more)) if num_more else rows
        out = F.linear(padded, self.weight.bfloat16(), bias)[: len(rows)]
        return out.unflatten(0, input.shape[:-1])
