"""Self-attention over item histories: causal as SASRec, bidirectional as BERT4Rec.

Kang, McAuley 2018 (SASRec) and Sun et al. 2019 (BERT4Rec), in pre-norm form.
Tokens stay packed (T, D) through every layer but the attention itself, which
pads a batch to its own longest history, so padding costs no other arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import TransformerConfig
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.item_content import ItemContent
from torchrec_pt.models.positions import RelativeTimeBias, Rotary
from torchrec_pt.rng import RowNoise


class Transformer(Backbone):
    """The transformer backbone; its item vectors are the rows of the item table and their content.

    A history's newest item always takes the last position, so a position means the same
    number of steps into the past in histories of any length. `positions` says how attention
    learns of them: `position`, `rotary` or `relative` is there, and the others are None.
    """

    def __init__(
        self, config: TransformerConfig, num_items: int, content: ItemContent | None = None
    ) -> None:
        super().__init__(config, config.history_length, num_items, content)
        self.is_causal = config.attention == "causal"
        self.max_length = config.max_length
        self.dropout = config.dropout
        self.mask = nn.Parameter(torch.empty(config.dim))
        self.position: nn.Parameter | None = None
        self.rotary: Rotary | None = None
        self.relative: RelativeTimeBias | None = None
        if config.positions == "learned":
            self.position = nn.Parameter(torch.empty(config.max_length, config.dim))
        elif config.positions == "rotary":
            self.rotary = Rotary(config.dim // config.num_heads, config.max_length)
        else:
            self.relative = RelativeTimeBias(config.num_heads, config.max_length, self.is_causal)
        self.reads_times = self.relative is not None
        ffn_dim = config.ffn_dim or 4 * config.dim
        self.blocks = nn.ModuleList(
            Block(config.dim, config.num_heads, ffn_dim) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02, biases 0 (BERT4Rec, section 3.6), from torch's generator."""
        reset_linear_layers(self)
        nn.init.normal_(self.mask, std=0.02)
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)
        if self.relative is not None:
            nn.init.normal_(self.relative.distance, std=0.02)
            nn.init.normal_(self.relative.elapsed, std=0.02)

    def layers(self) -> list[dict[str, list[str]]]:
        embeddings = {
            "item table": ["items"],
            "item content": ["content"],
            "positions, [MASK]": ["position", "relative", "mask"],
        }
        blocks = [{f"block {i + 1}": [f"blocks.{i}"]} for i in range(len(self.blocks))]
        blocks[-1]["norm"] = ["norm"]
        return [embeddings, *blocks]

    def encode_items(self, ids: Tensor, rows: Tensor) -> Tensor:
        return self.scaled(rows)

    def encode_positions(
        self,
        tokens: Jagged,
        noise: RowNoise | None,
        *,
        is_masked: Tensor | None = None,
    ) -> Tensor:
        """Contextual vectors of every token.

        Args:
            tokens: (T, D) item vectors in R rows of at most max_length, with their times where
                they are known and `positions` are by time.
            noise: dropout's randomness, rows numbered as the tokens' rows; None for no dropout.
            is_masked: (T,) bool, tokens to replace by [MASK].
        Returns:
            (T, D)
        Raises:
            ValueError: a row longer than max_length.
        """
        x, attention, drop = self._begin(tokens, noise, is_masked)
        for block in self.blocks:
            x = block(x, attention, drop)
        return self.scaled(self.norm(x))

    def _begin(
        self, tokens: Jagged, noise: RowNoise | None, is_masked: Tensor | None
    ) -> tuple[Tensor, Attention, RowDropout]:
        """(T, D), what enters the lowest block; attention and dropout of all blocks."""
        attention = Attention(tokens.offsets, self.is_causal)
        if attention.longest > self.max_length:
            raise ValueError(
                f"Transformer: rows may have {self.max_length} items, "
                f"given one of {attention.longest}; cut it with Jagged.tail"
            )
        row, slot = tokens.rows, self._slot(tokens)
        x = tokens.values
        if is_masked is not None:
            x = torch.where(is_masked.unsqueeze(1), self.mask, x)
        if self.position is not None:
            # Indexing would add up its gradient in the order in which threads come.
            x = x + F.embedding(slot, self.position)
        if self.rotary is not None:
            attention.turn = partial(self.rotary, slot=slot)
        if self.relative is not None:
            times = _visible_times(tokens, is_masked)
            attention.bias = self.relative(tokens, times, attention.longest)
        drop = RowDropout(self.dropout, self.heard(noise), "dropout", row, slot)
        return drop(x), attention, drop

    def encode_users(
        self,
        users: Tensor,
        history: Jagged,
        noise: RowNoise | None = None,
        *,
        is_masked: Tensor | None = None,
    ) -> Tensor:
        """(R, D), read off the last position; who the users are makes no difference.

        A bidirectional model reads it off a [MASK] after the history, which may be empty.
        A causal model gives zeros for an empty history. Nobody reads the other positions of the
        highest block, which therefore computes the last alone.
        """
        if not self.is_causal:
            history, is_masked = self._append_mask(history, is_masked)
        x, attention, drop = self._begin(history, noise, is_masked)
        *lower, highest = self.blocks
        for block in lower:
            x = block(x, attention, drop)
        last = attention.last
        x = highest(x, attention.of_last, drop.of(last), asked=last(x))
        has_last = (history.lengths > 0).unsqueeze(1)
        return torch.where(has_last, self.scaled(self.norm(x)), 0.0)

    def _slot(self, tokens: Jagged) -> Tensor:
        """(T,) row of `position` of each token: the newest takes the last."""
        lengths = tokens.lengths[tokens.rows]
        return self.max_length - lengths + tokens.positions

    def _append_mask(self, history: Jagged, is_masked: Tensor | None) -> tuple[Jagged, Tensor]:
        num_rows, device = history.num_rows, history.offsets.device
        offsets = history.offsets + torch.arange(num_rows + 1, device=device)
        old = torch.arange(len(history.values), device=device) + history.rows
        total = len(history.values) + num_rows
        values = history.values.new_zeros(total, self.dim).index_copy(0, old, history.values)
        masked = torch.ones(total, dtype=torch.bool, device=device)
        masked[old] = False if is_masked is None else is_masked
        times = None
        if history.times is not None:
            unknown = history.times.new_full((total,), torch.nan)
            times = unknown.index_copy(0, old, history.times)
        return Jagged(values, offsets, times), masked


def _visible_times(tokens: Jagged, is_masked: Tensor | None) -> Tensor:
    """(T,) times of the tokens; a hidden one has that of the newest visible one before it.

    So [MASK] means alike within a history and after a whole one, of whose next item the time is
    not known. Where nothing visible comes before it, neither is its own.
    """
    times = tokens.times_or_nan
    if is_masked is None:
        return times
    place = torch.arange(len(times), device=times.device)
    newest = place.masked_fill(is_masked, -1).cummax(0).values
    is_of_row = newest >= tokens.offsets[tokens.rows]
    return torch.where(is_of_row, times[newest.clamp(min=0)], torch.nan)


def reset_linear_layers(module: nn.Module) -> None:
    """Normal with deviation 0.02, biases 0, from torch's generator."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


Attend = Callable[[Tensor, int], Tensor]  # (…, 3 D) queries, keys, values; heads -> (…, D)
Drop = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """x + Attention(LN(x)), then x + FFN(LN(x)), on tokens (…, D), packed ones in training.

    Where `attention` answers some of the tokens' queries alone, those tokens are `asked`.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)

    def forward(
        self, x: Tensor, attention: Attend, drop: Drop, asked: Tensor | None = None
    ) -> Tensor:
        return self.feed_forward(self.attend(x, attention, drop, asked), drop)

    def attend(
        self, x: Tensor, attention: Attend, drop: Drop, asked: Tensor | None = None
    ) -> Tensor:
        answers = self.out(attention(self.qkv(self.attention_norm(x)), self.num_heads))
        return (x if asked is None else asked) + drop(answers)

    def feed_forward(self, x: Tensor, drop: Drop) -> Tensor:
        return x + drop(self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x)))))


class Attention:
    """Scaled dot-product attention within the rows of a packed batch.

    Attributes:
        longest: of the rows.
        turn: what turns the heads of queries and keys (T, 2 H, d) by their positions, or None.
        bias: (R, H, L, L), L = longest, is added to the logits; or None.
    """

    def __init__(self, offsets: Tensor, is_causal: bool) -> None:
        self.offsets = offsets
        self.is_causal = is_causal
        lengths = offsets.diff()
        self.longest = int(lengths.max()) if len(lengths) else 0
        self.turn: Callable[[Tensor], Tensor] | None = None
        self.bias: Tensor | None = None
        columns = torch.arange(self.longest, device=offsets.device)
        # Rows are padded at their end. A causal query never looks there; others must not.
        self.is_key = (columns < lengths.clamp(min=1).unsqueeze(1))[:, None, None, :]

    def __call__(self, qkv: Tensor, num_heads: int) -> Tensor:
        """(T, 3 D) -> (T, D)"""
        dim = qkv.shape[1] // 3
        if not self.longest:
            return self._of_nothing(qkv[:, :dim])
        query, key, value = self._heads(self._turned(qkv, num_heads), 3, num_heads)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self._mask, is_causal=self._mask is None
        )
        packed = out.transpose(1, 2).flatten(2)
        return torch.ops.fbgemm.dense_to_jagged(packed, [self.offsets], qkv.shape[0])[0]

    def last(self, tokens: Tensor) -> Tensor:
        """(R, …) of tokens (T, …): the last of each row; anything for a row without one."""
        # One more, so that the graph is the same on a rank without a token.
        tokens = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])
        return tokens[(self.offsets[1:] - 1).clamp(min=0)]

    def of_last(self, qkv: Tensor, num_heads: int) -> Tensor:
        """(T, 3 D) -> (R, D), to the query of each row's last token alone."""
        dim = qkv.shape[1] // 3
        if not self.longest:
            return self._of_nothing(self.last(qkv[:, :dim]))
        qkv = self._turned(qkv, num_heads)
        query = self.last(qkv[:, :dim]).unflatten(1, (num_heads, 1, -1))
        key, value = self._heads(qkv[:, dim:], 2, num_heads)
        mask = self.is_key
        if self.bias is not None:
            place = (self.offsets.diff() - 1).clamp(min=0)
            row = torch.arange(len(place), device=place.device)
            mask = self.bias[row, :, place].unsqueeze(2).masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).flatten(1)

    def _turned(self, qkv: Tensor, num_heads: int) -> Tensor:
        if self.turn is None:
            return qkv
        query_key, value = qkv.tensor_split([2 * (qkv.shape[1] // 3)], dim=1)
        turned = self.turn(query_key.unflatten(1, (2 * num_heads, -1)))
        return torch.cat([turned.flatten(1), value], dim=1)

    def _heads(self, tokens: Tensor, num: int, num_heads: int) -> Sequence[Tensor]:
        """(T, num · D) -> `num` times (R, num_heads, L, d)"""
        padded = torch.ops.fbgemm.jagged_to_padded_dense(
            tokens, [self.offsets], [self.longest], 0.0
        )
        heads = padded.unflatten(2, (num, num_heads, -1)).permute(2, 0, 3, 1, 4)
        return heads.unbind()  # whose gradients are stacked, not added to zeros

    @cached_property
    def _mask(self) -> Tensor | None:
        """What is added to the logits, or which of them count; None: what comes before."""
        if self.bias is None:
            return None if self.is_causal else self.is_key
        is_seen = self.is_key
        if self.is_causal:
            is_seen = is_seen.new_ones(self.longest, self.longest).tril()
        return self.bias.masked_fill(~is_seen, -torch.inf)

    def _of_nothing(self, query: Tensor) -> Tensor:
        """DDP wants the same graph from a rank without a token."""
        return query if self.bias is None else query + self.bias.sum()
