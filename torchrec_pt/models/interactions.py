"""What a user's vector, an item's and those of their features say together, before an MLP.

Each layer takes user (P, D), item (P, D) and fields (P, F, D) and gives (P, out_dim). Those that
take "all vectors" take user, item and fields, 2 + F of them.

    inner     user · item                                             1
    outer     user ⊗ item                                             D²
    hadamard  user ⊙ item                                             D
    concat    all vectors as they are                                 (2 + F) D
    fm        half of (Σ v)² − Σ v², summed over D: the sum of all     1
              pairs' inner products (Rendle 2010; Guo et al. 2017, DeepFM, section 2.1)
    cross     x ← x₀ ⊙ (V W x + b) + x twice, over all vectors in a    (2 + F) D
              row, W and V of rank D (Wang et al. 2021, DCN-v2, section 3.2)
    dot       user, and every pair's inner product                    D + (1 + F) (2 + F) / 2
              (Naumov et al. 2019, DLRM, section 2.1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import InteractionArch
from torchrec.modules.crossnet import LowRankCrossNet

from torchrec_pt.config import InteractionName

CROSS_LAYERS = 2


class Interaction(nn.Module):
    """The face of every layer; `out_dim` is the width of what it gives."""

    def __init__(self, dim: int, num_fields: int, out_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_fields = num_fields
        self.out_dim = out_dim

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        """(P, D), (P, D), (P, F, D) -> (P, out_dim)"""
        raise NotImplementedError


class Inner(Interaction):
    def __init__(self, dim: int, num_fields: int) -> None:
        super().__init__(dim, num_fields, 1)

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        return (user * item).sum(1, keepdim=True)


class Outer(Interaction):
    def __init__(self, dim: int, num_fields: int) -> None:
        super().__init__(dim, num_fields, dim * dim)

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        return (user.unsqueeze(2) * item.unsqueeze(1)).flatten(1)


class Hadamard(Interaction):
    def __init__(self, dim: int, num_fields: int) -> None:
        super().__init__(dim, num_fields, dim)

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        return user * item


class Concat(Interaction):
    def __init__(self, dim: int, num_fields: int) -> None:
        super().__init__(dim, num_fields, (2 + num_fields) * dim)

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        return _all_vectors(user, item, fields).flatten(1)


class Fm(Interaction):
    """Not TorchRec's FactorizationMachine, which takes a vector's elements for features, too."""

    def __init__(self, dim: int, num_fields: int) -> None:
        super().__init__(dim, num_fields, 1)

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        vectors = _all_vectors(user, item, fields)
        pairs = vectors.sum(1).square() - vectors.square().sum(1)
        return 0.5 * pairs.sum(1, keepdim=True)


class Cross(Interaction):
    def __init__(self, dim: int, num_fields: int) -> None:
        super().__init__(dim, num_fields, (2 + num_fields) * dim)
        self.cross = LowRankCrossNet(self.out_dim, CROSS_LAYERS, low_rank=dim)

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        crossed: Tensor = self.cross(_all_vectors(user, item, fields).flatten(1))
        return crossed


class Dot(Interaction):
    def __init__(self, dim: int, num_fields: int) -> None:
        num_vectors = 2 + num_fields
        super().__init__(dim, num_fields, dim + num_vectors * (num_vectors - 1) // 2)
        self.dot = InteractionArch(num_vectors - 1)

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        dotted: Tensor = self.dot(user, torch.cat([item.unsqueeze(1), fields], dim=1))
        return dotted


_LAYERS: dict[str, type[Inner | Outer | Hadamard | Concat | Fm | Cross | Dot]] = {
    "inner": Inner,
    "outer": Outer,
    "hadamard": Hadamard,
    "concat": Concat,
    "fm": Fm,
    "cross": Cross,
    "dot": Dot,
}


def build_interaction(name: InteractionName, dim: int, num_fields: int) -> Interaction:
    return _LAYERS[name](dim, num_fields)


class Interactions(Interaction):
    """Several layers side by side."""

    def __init__(self, names: Sequence[InteractionName], dim: int, num_fields: int) -> None:
        layers = [build_interaction(name, dim, num_fields) for name in names]
        super().__init__(dim, num_fields, sum(layer.out_dim for layer in layers))
        self.layers = nn.ModuleDict(dict(zip(names, layers, strict=True)))

    def forward(self, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
        return torch.cat([layer(user, item, fields) for layer in self.layers.values()], dim=1)


def _all_vectors(user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
    """(P, 2 + F, D)"""
    return torch.cat([user.unsqueeze(1), item.unsqueeze(1), fields], dim=1)
