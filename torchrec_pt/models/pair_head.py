"""A number for a pair of user and item: what the ctr and rating tasks put on a backbone.

The head starts from biases and adds what the user's labels say of their neighbours:

    y = base + slope · (b_i + w · [m_u, a_ui, t_ui]) + MLP(layers(u, i, [z_ui, features]), echoes)

b_i is the item's bias, m_u the mean of the residuals in the user's history (Koren 2010,
"Factor in the neighbors", section 2.1), and a_ui their means by attention from the target item,
one a head (Zhou et al. 2018, DIN), an item-kNN whose similarities are learned; z_ui is the same
mean of the history's item vectors. t_ui is an asymmetric SVD (Koren 2010, section 4): the sum of
the history's vectors, each times its residual, set against the target's. Echoes are m_u, a_ui
and t_ui. `layers` are those of `interactions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import InteractionName
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.interactions import Interactions
from torchrec_pt.models.positions import NUM_TIME_BUCKETS, time_bucket


@dataclass(frozen=True)
class Pairs:
    """R users, each with the target items to be judged for them, P in all.

    Attributes:
        users: (R, D) user vectors.
        targets: R rows of target item vectors (P, D), with their times where they are known.
        memory: R rows of the item vectors (T, D) of the user's history, with theirs.
        residuals: (T,) what the user's labels of the history differ from what was expected; NaN
            where the label is not known.
        fields: (P, F, D) vectors of the features of user, item and interaction.
    """

    users: Tensor
    targets: Jagged
    memory: Jagged
    residuals: Tensor
    fields: Tensor


class PairHead(nn.Module):
    """w · [m_u, a_ui, t_ui] and the MLP of the formula above; the MLP starts at 0.

    Args:
        shrinkage: observations that pull m_u to 0.
        attention_weight: where the weights of a_ui start, their sum.
    """

    def __init__(
        self,
        dim: int,
        num_fields: int,
        hidden_dims: tuple[int, ...],
        *,
        interactions: Sequence[InteractionName],
        num_heads: int,
        shrinkage: float,
        attention_weight: float,
    ) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.attention = HistoryAttention(dim, num_heads)
        self.taste = Taste(dim)
        each = attention_weight / num_heads
        self.echo_weight = nn.Parameter(torch.tensor([0.5, *[each] * num_heads, 0.0]))
        self.interactions = Interactions(interactions, dim, 1 + num_fields)
        widths = [self.interactions.out_dim + num_heads + 2, *hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.out = nn.Linear(widths[-1], 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, pairs: Pairs, drop: RowDropout) -> tuple[Tensor, Tensor]:
        """(P,) w · [m_u, a_ui, t_ui], and (P,) the MLP."""
        row = pairs.targets.rows
        # Indexing would add up its gradient in the order in which threads come.
        user, item = F.embedding(row, pairs.users), pairs.targets.values
        is_known = ~pairs.residuals.isnan()
        residuals = pairs.memory.with_values(pairs.residuals.nan_to_num(0.0))
        attended, echo = self.attention(pairs.targets, pairs.memory, residuals.values, is_known)
        num_known = sums_of_rows(residuals.with_values(is_known.float()))
        shrunk = num_known + self.shrinkage
        mean = sums_of_rows(residuals) / shrunk.clamp(min=1)
        taste = self.taste(pairs.targets, pairs.memory, residuals.values, shrunk)
        echoes = torch.cat([mean[row].unsqueeze(1), echo, taste.unsqueeze(1)], dim=1)
        fields = torch.cat([attended.unsqueeze(1), pairs.fields], dim=1)
        x = torch.cat([self.interactions(user, item, fields), echoes], dim=1)
        for layer in self.hidden:
            x = drop(F.gelu(layer(x)))
        return echoes @ self.echo_weight, self.out(x).squeeze(1)


class HistoryAttention(nn.Module):
    """From a target item to the items of the user's history, by likeness of their vectors.

    One projection serves queries and keys, an isometry to begin with, so that pretrained vectors
    are compared by their cosine. A null key of learned logit takes what no item deserves. Where
    times are known, a bias of each head says how much the time between the two matters.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        assert dim % num_heads == 0
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.likeness = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.null = nn.Parameter(torch.zeros(num_heads))
        self.elapsed = nn.Parameter(torch.zeros(num_heads, 2 * NUM_TIME_BUCKETS + 1))
        nn.init.orthogonal_(self.likeness.weight)

    def forward(
        self, targets: Jagged, memory: Jagged, residuals: Tensor, is_known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """((P, D) means of values, (P, num_heads) means of residuals), weighted by the attention.

        The residuals' mean is over the items of known labels, (T,) bool, alone.
        """
        query, key = (
            _padded(each.with_values(self.likeness(self.norm(each.values))))
            for each in (targets, memory)
        )
        value = _padded(memory.with_values(self.value(memory.values)))
        query, key, value = (
            each.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for each in (query, key, value)
        )
        # (R, H, most targets, longest history); a head's vectors count as if they were whole ones
        logits = query @ key.transpose(2, 3) * (self.num_heads**0.5 / key.shape[3] ** 0.5)
        if targets.times is not None and memory.times is not None:
            logits = logits + self._time_bias(targets, memory)
        is_hidden = torch.arange(key.shape[2], device=key.device) >= memory.lengths.unsqueeze(1)
        mean = (self._shares(logits, is_hidden) @ value).transpose(1, 2).flatten(2)
        told = _padded(memory.with_values(torch.stack([residuals, is_known.float()], dim=1)))
        shares = self._shares(logits, is_hidden | (told[..., 1] == 0))
        echo = (shares @ told[..., :1].unsqueeze(1)).squeeze(3).transpose(1, 2)
        both = torch.cat([mean, echo], dim=2)
        packed = torch.ops.fbgemm.dense_to_jagged(both, [targets.offsets], len(targets.values))[0]
        return packed[:, : -self.num_heads], packed[:, -self.num_heads :]

    def _shares(self, logits: Tensor, is_hidden: Tensor) -> Tensor:
        """(R, H, most targets, longest) softmax beside the null key; hidden: (R, longest)."""
        null = self.null.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        seen = logits.masked_fill(is_hidden[:, None, None], -torch.inf)
        return torch.cat([null, seen], dim=3).softmax(dim=3)[..., 1:]

    def _time_bias(self, targets: Jagged, memory: Jagged) -> Tensor:
        """(R, H, most targets, longest history)"""
        then, now = (_padded_times(each) for each in (memory, targets))
        between = (now.unsqueeze(2) - then.unsqueeze(1)).float()
        bucket = time_bucket(between)
        bucket = torch.where(between < 0, NUM_TIME_BUCKETS + 1 + bucket, bucket)
        flat = bucket.flatten().expand(self.num_heads, -1)
        return self.elapsed.gather(1, flat).unflatten(1, bucket.shape).transpose(0, 1)


class Taste(nn.Module):
    """t_ui = Σ_j r_j x_j · y_i / √(num_known + shrinkage), x and y linear in the item vectors."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.said = nn.Linear(dim, dim, bias=False)
        self.asked = nn.Linear(dim, dim, bias=False)

    def forward(self, targets: Jagged, memory: Jagged, residuals: Tensor, shrunk: Tensor) -> Tensor:
        """(P,)"""
        said = self.said(self.norm(memory.values)) * residuals.unsqueeze(1)
        taste = sums_of_rows(memory.with_values(said)) / shrunk.clamp(min=1).sqrt().unsqueeze(1)
        asked = self.asked(self.norm(targets.values))
        return (F.embedding(targets.rows, taste) * asked).sum(1) / asked.shape[1] ** 0.5


def sums_of_rows(jagged: Jagged) -> Tensor:
    """(R, …) sum of each row's values (T, …); 0 for an empty row."""
    return torch.segment_reduce(jagged.values, "sum", offsets=jagged.offsets, initial=0.0)


def _padded(jagged: Jagged) -> Tensor:
    """(R, longest, D), zeros after the end of a row."""
    longest = max(1, int(jagged.lengths.max())) if jagged.num_rows else 1
    return torch.ops.fbgemm.jagged_to_padded_dense(jagged.values, [jagged.offsets], [longest], 0.0)


def _padded_times(jagged: Jagged) -> Tensor:
    """(R, longest) float64, NaN after the end of a row."""
    longest = max(1, int(jagged.lengths.max())) if jagged.num_rows else 1
    padded = jagged.times_or_nan.new_full((jagged.num_rows, longest), torch.nan)
    padded[jagged.rows, jagged.positions] = jagged.times_or_nan
    return padded
