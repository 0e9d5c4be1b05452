"""A number for a pair of user and item: what the ctr and rating tasks put on a backbone.

The head starts from biases and adds what two neighbourhoods say:

    y = base + slope · (b_i + w · [m_u, a_ui]) + MLP(u, i, u ⊙ i, z_ui, features, m_u, a_ui)

b_i is the item's bias, m_u the mean of the residuals in the user's history (Koren 2010,
"Factor in the neighbors", section 2.1), and a_ui their mean by attention from the target item
(Zhou et al. 2018, DIN), an item-kNN whose similarities are learned; z_ui is the same mean of
the history's item vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.dropout import RowDropout


@dataclass(frozen=True)
class Pairs:
    """R users, each with the target items to be judged for them, P in all.

    Attributes:
        users: (R, D) user vectors.
        targets: R rows of target item vectors (P, D).
        memory: R rows of the item vectors (T, D) of the user's history.
        residuals: (T,) what the user's labels of the history differ from what was expected.
        fields: (P, F, D) vectors of the features of user, item and interaction.
    """

    users: Tensor
    targets: Jagged
    memory: Jagged
    residuals: Tensor
    fields: Tensor


class PairHead(nn.Module):
    """w · [m_u, a_ui] and the MLP of the formula above; the MLP starts at 0.

    Args:
        shrinkage: observations that pull m_u to 0.
        attention_weight: where the weight of a_ui starts.
    """

    def __init__(
        self,
        dim: int,
        num_fields: int,
        hidden_dims: tuple[int, ...],
        *,
        shrinkage: float,
        attention_weight: float,
    ) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.attention = HistoryAttention(dim)
        self.echo_weight = nn.Parameter(torch.tensor([0.5, attention_weight]))
        widths = [(4 + num_fields) * dim + 2, *hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.out = nn.Linear(widths[-1], 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, pairs: Pairs, drop: RowDropout) -> tuple[Tensor, Tensor]:
        """(P,) w · [m_u, a_ui], and (P,) the MLP."""
        row = pairs.targets.rows
        # Indexing would add up its gradient in the order in which threads come.
        user, item = F.embedding(row, pairs.users), pairs.targets.values
        attended, echo = self.attention(pairs.targets, pairs.memory, pairs.residuals)
        mean = shrunk_means(pairs.memory.with_values(pairs.residuals), self.shrinkage)[row]
        echoes = torch.stack([mean, echo], dim=1)
        x = torch.cat([user, item, user * item, attended, pairs.fields.flatten(1), echoes], dim=1)
        for layer in self.hidden:
            x = drop(F.gelu(layer(x)))
        return echoes @ self.echo_weight, self.out(x).squeeze(1)


class HistoryAttention(nn.Module):
    """From a target item to the items of the user's history, by likeness of their vectors.

    One projection serves queries and keys, an isometry to begin with, so that pretrained vectors
    are compared by their cosine. A null key of learned logit takes what no item deserves.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.likeness = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.null = nn.Parameter(torch.zeros(1))
        nn.init.orthogonal_(self.likeness.weight)

    def forward(self, targets: Jagged, memory: Jagged, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """((P, D) mean of values, (P,) mean of residuals), weighted by the attention."""
        dim = memory.values.shape[1]
        query = _padded(targets.with_values(self.likeness(self.norm(targets.values))))
        key = _padded(memory.with_values(self.likeness(self.norm(memory.values))))
        values = torch.cat([self.value(memory.values), residuals.unsqueeze(1)], dim=1)
        logits = query @ key.transpose(1, 2) / dim**0.5  # (R, most targets, longest history)
        is_padding = torch.arange(key.shape[1], device=key.device) >= memory.lengths.unsqueeze(1)
        logits = logits.masked_fill(is_padding.unsqueeze(1), -torch.inf)
        null = self.null.expand(*logits.shape[:2], 1)
        share = torch.cat([null, logits], dim=2).softmax(dim=2)[..., 1:]
        mean = share @ _padded(memory.with_values(values))
        packed = torch.ops.fbgemm.dense_to_jagged(mean, [targets.offsets], len(targets.values))[0]
        return packed[:, :dim], packed[:, dim]


def shrunk_means(jagged: Jagged, shrinkage: float) -> Tensor:
    """(R,) sum of each row's values (T,) over (their number + shrinkage); 0 for an empty row."""
    sums = torch.segment_reduce(jagged.values, "sum", offsets=jagged.offsets, initial=0.0)
    return sums / (jagged.lengths + shrinkage).clamp(min=1)


def _padded(jagged: Jagged) -> Tensor:
    """(R, longest, D), zeros after the end of a row."""
    longest = max(1, int(jagged.lengths.max())) if jagged.num_rows else 1
    return torch.ops.fbgemm.jagged_to_padded_dense(jagged.values, [jagged.offsets], [longest], 0.0)
