"""From a padded history to a user's vector: the twins of the backbones' `encode_users`.

They share the backbone's layers and put other arithmetic between them: training packs the tokens
of all rows, which needs operators that a program of torch alone has not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.models.autoencoder import Autoencoder
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.positions import time_bucket
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.models.two_tower import TwoTower


@dataclass(frozen=True)
class Padded:
    """R histories of L places.

    Attributes:
        is_read: (R, L) bool, whether an item stands there and is read.
        age: (R, L) int64, items of the row that came later.
        rows: (R, L, row_dim) of the items; anything where none is read.
        times: (R, L) float64, NaN where not known; None where nobody reads them.
    """

    is_read: Tensor
    age: Tensor
    rows: Tensor
    times: Tensor | None = None

    @property
    def num_read(self) -> Tensor:
        """(R,) int64."""
        return self.is_read.sum(1)

    def newest(self, most: int) -> Padded:
        """Of each row no more than so many are read."""
        return replace(self, is_read=self.is_read & (self.age < most))

    def sums(self, values: Tensor) -> Tensor:
        """(R, …) over what is read of values (R, L, …)."""
        is_read = self.is_read.view(*self.is_read.shape, *[1] * (values.dim() - 2))
        return torch.where(is_read, values, 0.0).sum(1)


def ages(history: Tensor) -> Tensor:
    """(R, L) int64: how many items of history (R, L), −1 where there is none, came later."""
    is_item = (history >= 0).long()
    return is_item.sum(1, keepdim=True) - is_item.cumsum(1)


class TransformerUsers(nn.Module):
    def __init__(self, backbone: Transformer) -> None:
        super().__init__()
        self.is_causal = backbone.is_causal
        self.max_length = backbone.max_length
        self.mask = None if backbone.is_causal else backbone.mask
        self.position = backbone.position
        self.rotary, self.relative = backbone.rotary, backbone.relative
        self.blocks, self.norm = backbone.blocks, backbone.norm
        self._scaled = backbone.scaled

    def forward(self, history: Padded, fields: Tensor | None) -> Tensor:
        """(R, D); `fields` is None."""
        has_any = history.is_read.any(1, keepdim=True)
        if self.mask is not None:
            history = self._with_mask(history, self.mask)
        x, slot = history.rows, (self.max_length - 1 - history.age).clamp(min=0)
        if self.position is not None:
            x = x + self.position[slot]
        attention = _Attention(self, history, slot)
        *lower, highest = self.blocks
        for block in lower:
            x = block(x, attention, _keep)
        x = highest(x, attention.of_last, _keep, asked=attention.last(x))
        last = self._scaled(self.norm(x))
        return last if self.mask is not None else torch.where(has_any, last, 0.0)

    def _with_mask(self, history: Padded, mask: Tensor) -> Padded:
        """[MASK] after the newest item, at the time of that one."""
        num_rows = history.rows.shape[0]
        rows = torch.cat([history.rows, mask.expand(num_rows, 1, -1)], dim=1)
        is_read = F.pad(history.is_read, (0, 1), value=True)
        age = F.pad(history.age + 1, (0, 1))
        times = history.times
        if times is not None:
            is_newest = history.is_read & (history.age == 0)
            newest = torch.where(is_newest, times, 0.0).sum(1, keepdim=True)
            newest = torch.where(is_newest.any(1, keepdim=True), newest, torch.nan)
            times = torch.cat([times, newest], dim=1)
        return Padded(is_read, age, rows, times)


class _Attention:
    """Scaled dot-product attention over padded rows."""

    def __init__(self, users: TransformerUsers, history: Padded, slot: Tensor) -> None:
        self.rotary, self.slot = users.rotary, slot
        age = history.age
        self.is_last = history.is_read & (age == 0)
        is_key = history.is_read.unsqueeze(1)
        if users.is_causal:
            is_key = is_key & (age.unsqueeze(1) >= age.unsqueeze(2))
        # Who is not read sees itself, so that no softmax is over nothing.
        place = torch.arange(age.shape[1], device=age.device)
        is_key = is_key | (place == place.unsqueeze(1))
        self.mask = is_key.unsqueeze(1)
        if users.relative is not None:
            assert history.times is not None
            bias = users.relative
            distance = (age.unsqueeze(1) - age.unsqueeze(2)).clamp(min=-bias.farthest_ahead)
            distance = (distance + bias.farthest_ahead).clamp(max=bias.distance.shape[1] - 1)
            between = (history.times.unsqueeze(2) - history.times.unsqueeze(1)).float()
            logits = bias.distance[:, distance] + bias.elapsed[:, time_bucket(between)]
            self.mask = logits.transpose(0, 1).masked_fill(~self.mask, -torch.inf)

    def __call__(self, qkv: Tensor, num_heads: int) -> Tensor:
        """(R, L, 3 D) -> (R, L, D)"""
        query, key, value = self._heads(qkv, num_heads)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return out.transpose(1, 2).flatten(2)

    def last(self, tokens: Tensor) -> Tensor:
        """(R, D) of tokens (R, L, D): the newest of each row, zeros where none is read."""
        return torch.where(self.is_last.unsqueeze(2), tokens, 0.0).sum(1)

    def of_last(self, qkv: Tensor, num_heads: int) -> Tensor:
        """(R, L, 3 D) -> (R, D), to the query of each row's newest alone."""
        query, key, value = self._heads(qkv, num_heads)
        is_last = self.is_last[:, None, :, None]
        query = torch.where(is_last, query, 0.0).sum(2, keepdim=True)
        if self.mask.dtype == torch.bool:
            mask = (self.mask & is_last).any(2, keepdim=True) | ~is_last.any(2, keepdim=True)
        else:
            mask = torch.where(is_last, self.mask, 0.0).sum(2, keepdim=True)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).flatten(1)

    def _heads(self, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(R, L, 3 D) -> three times (R, H, L, d)"""
        query, key, value = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
        if self.rotary is not None:
            query, key = (self._turned(self.rotary, each) for each in (query, key))
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _turned(self, rotary: nn.Module, heads: Tensor) -> Tensor:
        return rotary(heads.flatten(0, 1), self.slot.flatten()).view(heads.shape)


class AutoencoderUsers(nn.Module):
    def __init__(self, backbone: Autoencoder) -> None:
        super().__init__()
        self.input_dim = backbone.input_dim
        self.is_linear = backbone.is_linear
        self.bias, self.hidden, self.mean = backbone.bias, backbone.hidden, backbone.mean

    def forward(self, history: Padded, fields: Tensor | None) -> Tensor:
        """(R, D); `fields` is None."""
        bags = history.sums(history.rows[:, :, : self.input_dim])
        x = bags / history.num_read.clamp(min=1).sqrt().unsqueeze(1) + self.bias
        x = x if self.is_linear else torch.tanh(x)
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return F.pad(self.mean(x), (0, 1), value=1.0)


class TwoTowerUsers(nn.Module):
    def __init__(self, backbone: TwoTower) -> None:
        super().__init__()
        self.tower = backbone.user_tower
        self._scaled = backbone.scaled

    def forward(self, history: Padded, fields: Tensor | None) -> Tensor:
        """(R, D); `fields` (R, F, D) of the users' features, None where there are none."""
        mean = history.sums(history.rows) / history.num_read.clamp(min=1).unsqueeze(1)
        none = mean.new_zeros(mean.shape[0], 0, mean.shape[1])
        return self._scaled(self.tower(mean, none if fields is None else fields))


def build_users(backbone: Backbone) -> TransformerUsers | AutoencoderUsers | TwoTowerUsers:
    """The twin of a backbone's `encode_users`."""
    if isinstance(backbone, Transformer):
        return TransformerUsers(backbone)
    if isinstance(backbone, Autoencoder):
        return AutoencoderUsers(backbone)
    assert isinstance(backbone, TwoTower)
    return TwoTowerUsers(backbone)


def _keep(x: Tensor) -> Tensor:
    """Dropout that drops nothing."""
    return x
