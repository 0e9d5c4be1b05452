"""A number for a pair of user and item: what the ctr and rating tasks put on a backbone.

The head starts from biases and adds what the user's labels say of their neighbours:

    y = base + slope · (b_i + w · [m_u, a_ui] + t_ui) + MLP(layers(u, i, [z_ui, features]), echoes)

b_i is the item's bias, m_u the mean of the residuals in the user's history (Koren 2010,
"Factor in the neighbors", section 2.1), and a_ui their means by attention from the target item,
one a head (Zhou et al. 2018, DIN), an item-kNN whose similarities are learned; z_ui is the same
mean of the history's item vectors. t_ui is the factor model of `Factors`. Echoes are m_u, a_ui
and t_ui; `layers` those of `interactions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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
        user_fields, item_fields, other_fields: (P, …, D) vectors of the features of the user, the
            item and the interaction.
    """

    users: Tensor
    targets: Jagged
    memory: Jagged
    residuals: Tensor
    user_fields: Tensor
    item_fields: Tensor
    other_fields: Tensor


class PairDropout(NamedTuple):
    """Where a head drops activations of P pairs and T items of their histories.

    A user's factors share a mask over the user's pairs, and so do an item's over its users: with
    a mask for every pair, the factors that others lose would still be learned from.

    Attributes:
        hidden: (P, …) of the MLP.
        users, items: (P, D) of the factors.
        memory: (T, D) of what a history says.
    """

    hidden: RowDropout
    users: RowDropout
    items: RowDropout
    memory: RowDropout


class Judged(NamedTuple):
    """Of P pairs.

    Attributes:
        deviation: (P,) w · [m_u, a_ui] + t_ui, in the unit of the labels.
        learned: (P,) the MLP.
        size: (P,) ‖p_u‖² + ‖q_i‖² of the factors.
    """

    deviation: Tensor
    learned: Tensor
    size: Tensor


class PairHead(nn.Module):
    """Everything of the formula above but b_i; the MLP starts at 0.

    Args:
        shrinkage: observations that pull m_u to 0.
        attention_weight: where the weights of a_ui start, their sum.
        factor_weight: of t_ui, which starts small.
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
        factor_weight: float,
    ) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.attention = HistoryAttention(dim, num_heads)
        self.factors = Factors(dim)
        each = attention_weight / num_heads
        self.echo_weight = nn.Parameter(torch.tensor([1.0, *[each] * num_heads]))
        self.factor_weight = factor_weight
        self.interactions = Interactions(interactions, dim, 1 + num_fields)
        widths = [self.interactions.out_dim + num_heads + 2, *hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.out = nn.Linear(widths[-1], 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, pairs: Pairs, drop: PairDropout) -> Judged:
        row = pairs.targets.rows
        # Indexing would add up its gradient in the order in which threads come.
        user, item = F.embedding(row, pairs.users), pairs.targets.values
        is_known = ~pairs.residuals.isnan()
        residuals = pairs.memory.with_values(pairs.residuals.nan_to_num(0.0))
        num_known = sums_of_rows(residuals.with_values(is_known.float()))
        mean = sums_of_rows(residuals) / (num_known + self.shrinkage).clamp(min=1)
        beyond = torch.where(
            is_known,
            residuals.values - F.embedding(residuals.rows, mean.unsqueeze(1)).squeeze(1),
            0.0,
        )
        attended, echo = self.attention(pairs.targets, pairs.memory, beyond, is_known)
        factored, size = self.factors(pairs, beyond, drop)
        echoes = torch.cat([mean[row].unsqueeze(1), echo], dim=1)
        deviation = echoes @ self.echo_weight + self.factor_weight * factored
        fields = [attended.unsqueeze(1), pairs.user_fields, pairs.item_fields, pairs.other_fields]
        x = self.interactions(user, item, torch.cat(fields, dim=1))
        x = torch.cat([x, echoes, factored.unsqueeze(1)], dim=1)
        for layer in self.hidden:
            x = drop.hidden(F.gelu(layer(x)))
        return Judged(deviation, self.out(x).squeeze(1), size)


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
        # In the type of the vectors, which linear layers leave where they multiply in bfloat16.
        query, key = (
            _padded(each.with_values(self.likeness(self.norm(each.values)).to(each.values)))
            for each in (targets, memory)
        )
        value = _padded(memory.with_values(self.value(memory.values).to(memory.values)))
        told = _padded(memory.with_values(torch.stack([residuals, is_known.float()], dim=1)))
        is_hidden = torch.arange(key.shape[1], device=key.device) >= memory.lengths.unsqueeze(1)
        between = None
        if targets.times is not None and memory.times is not None:
            then, now = (_padded_times(each) for each in (memory, targets))
            between = time_between(then, now)
        both = self.attend(query, key, value, told, is_hidden, between)
        packed = torch.ops.fbgemm.dense_to_jagged(both, [targets.offsets], len(targets.values))[0]
        return packed[:, : -self.num_heads], packed[:, -self.num_heads :]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        told: Tensor,
        is_hidden: Tensor,
        between: Tensor | None,
    ) -> Tensor:
        """(R, M, D + num_heads) of padded rows: means of values, then means of residuals.

        Args:
            query: (R, M, D) of the targets. key, value: (R, L, D) of the history's items.
            told: (R, L, 2) residuals, and 1 where they are known.
            is_hidden: (R, L) bool, where a row holds no item.
            between: (R, M, L) float32 times from the items to the targets, or None.
        """
        query, key, value = (
            each.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for each in (query, key, value)
        )
        # (R, H, M, L); a head's vectors count as if they were whole ones
        scale = self.num_heads**0.5 / key.shape[3] ** 0.5
        logits = (query @ key.transpose(2, 3)).mul_(scale)
        if between is not None:
            logits.add_(self._time_bias(between))
        mean = (self._shares(logits, is_hidden) @ value).transpose(1, 2).flatten(2)
        shares = self._shares(logits, is_hidden | (told[..., 1] == 0))
        echo = (shares @ told[..., :1].unsqueeze(1)).squeeze(3).transpose(1, 2)
        return torch.cat([mean, echo], dim=2)

    def _shares(self, logits: Tensor, is_hidden: Tensor) -> Tensor:
        """(R, H, most targets, longest) softmax beside the null key; hidden: (R, longest)."""
        null = self.null.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        # Added: to fill them, and their gradient with zeros, takes several times as long.
        hiding = torch.zeros_like(is_hidden, dtype=logits.dtype).masked_fill_(is_hidden, -torch.inf)
        seen = torch.cat([null, logits], dim=3).add_(F.pad(hiding, (1, 0))[:, None, None])
        return seen.softmax(dim=3)[..., 1:]

    def _time_bias(self, between: Tensor) -> Tensor:
        """(R, H, M, L)"""
        bucket = time_bucket(between).add_(between < 0, alpha=NUM_TIME_BUCKETS + 1)
        flat = bucket.flatten().expand(self.num_heads, -1)
        return self.elapsed.gather(1, flat).unflatten(1, bucket.shape).transpose(0, 1)


class Factors(nn.Module):
    """t_ui = p_u · q_i, a factor model whose users are what their history says.

    p_u = (Σ_j r_j B v_j + Σ_j C v_j) / √(n + 1) + the user's features, over the n items of the
    history, of which the labels of some may be unknown (r_j = 0); q_i = A v_i + the item's
    features. It is SVD++ without vectors of the users' own (Koren 2008, section 3 and 4), all
    vectors linear in the model's item vectors v.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.said = nn.Linear(dim, dim, bias=False)
        self.taken = nn.Linear(dim, dim, bias=False)
        self.asked = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.asked.weight)  # whatever the vectors' size
        for layer in (self.said, self.taken):
            nn.init.normal_(layer.weight, std=0.1)

    def forward(self, pairs: Pairs, residuals: Tensor, drop: PairDropout) -> tuple[Tensor, Tensor]:
        """(P,) t_ui and (P,) ‖p_u‖² + ‖q_i‖².

        Args:
            residuals: (T,) as of the pairs, 0 where unknown.
        """
        vectors, row = pairs.memory.values, pairs.targets.rows
        told = drop.memory(residuals.unsqueeze(1) * self.said(vectors) + self.taken(vectors))
        root = (pairs.memory.lengths + 1).sqrt().unsqueeze(1)
        user = F.embedding(row, sums_of_rows(pairs.memory.with_values(told)) / root)
        user = user + pairs.user_fields.sum(1)
        item = self.asked(pairs.targets.values) + pairs.item_fields.sum(1)
        size = user.square().sum(1) + item.square().sum(1)
        return (drop.users(user) * drop.items(item)).sum(1), size


def time_between(then: Tensor, now: Tensor) -> Tensor:
    """(R, M, L) float32 from the times `then` (R, L) to `now` (R, M), both float64."""
    return (now.unsqueeze(2) - then.unsqueeze(1)).float()


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
