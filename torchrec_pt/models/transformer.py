"""Self-attention over item histories: causal as SASRec, bidirectional as BERT4Rec.

Kang, McAuley 2018 (SASRec) and Sun et al. 2019 (BERT4Rec), in pre-norm form.
Tokens stay packed (T, D) through every layer but the attention itself, which
pads a batch to its own longest history, so padding costs no other arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
        attention = Attention(tokens.offsets, self.is_causal)
        if attention.longest > self.max_length:
            raise ValueError(
                f"encode_positions: rows may have {self.max_length} items, "
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
            attention.add(self.relative(tokens, times, attention.longest))
        drop = RowDropout(self.dropout, self.heard(noise), "dropout", row, slot)
        x = drop(x)
        for block in self.blocks:
            x = block(x, attention, drop)
        return self.scaled(self.norm(x))

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
        A causal model gives zeros for an empty history.
        """
        if not self.is_causal:
            history, is_masked = self._append_mask(history, is_masked)
        encoded = self.encode_positions(history, noise, is_masked=is_masked)
        has_last = history.lengths > 0
        last = (history.offsets[1:] - 1).clamp(min=0)
        # One row more, so that the graph is the same on a rank without a token.
        encoded = torch.cat([encoded, encoded.new_zeros(1, self.dim)])
        return torch.where(has_last.unsqueeze(1), encoded[last], 0.0)

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
    """x + Attention(LN(x)), then x + FFN(LN(x)), on tokens (…, D), packed ones in training."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor, attention: Attend, drop: Drop) -> Tensor:
        return self.feed_forward(self.attend(x, attention, drop), drop)

    def attend(self, x: Tensor, attention: Attend, drop: Drop) -> Tensor:
        return x + drop(self.out(attention(self.qkv(self.attention_norm(x)), self.num_heads)))

    def feed_forward(self, x: Tensor, drop: Drop) -> Tensor:
        return x + drop(self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x)))))


class Attention:
    """Scaled dot-product attention within the rows of a packed batch.

    Attributes:
        longest: of the rows.
        turn: what turns the heads of queries and keys (T, 2 H, d) by their positions, or None.
    """

    def __init__(self, offsets: Tensor, is_causal: bool) -> None:
        self.offsets = offsets
        self.is_causal = is_causal
        lengths = offsets.diff()
        self.longest = int(lengths.max()) if len(lengths) else 0
        self.turn: Callable[[Tensor], Tensor] | None = None
        self.bias: Tensor | None = None
        self.mask: Tensor | None = None
        if not is_causal:
            # Rows are padded at their end. A causal query never looks there; others must not.
            columns = torch.arange(self.longest, device=offsets.device)
            is_key = columns < lengths.clamp(min=1).unsqueeze(1)
            self.mask = is_key[:, None, None, :]

    def add(self, bias: Tensor) -> None:
        """Add (R, H, L, L), L = longest, to the logits."""
        is_seen = self.mask
        if is_seen is None:
            is_seen = bias.new_ones(self.longest, self.longest, dtype=torch.bool).tril()
        self.bias = bias
        self.mask, self.is_causal = bias.masked_fill(~is_seen, -torch.inf), False

    def __call__(self, qkv: Tensor, num_heads: int) -> Tensor:
        """(T, 3 D) -> (T, D)"""
        dim = qkv.shape[1] // 3
        if not self.longest:
            nothing = qkv[:, :dim]
            # DDP wants the same graph from a rank without a token.
            return nothing if self.bias is None else nothing + self.bias.sum()
        if self.turn is not None:
            turned = self.turn(qkv[:, : 2 * dim].unflatten(1, (2 * num_heads, -1)))
            qkv = torch.cat([turned.flatten(1), qkv[:, 2 * dim :]], dim=1)
        padded = torch.ops.fbgemm.jagged_to_padded_dense(qkv, [self.offsets], [self.longest], 0.0)
        heads = padded.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()  # whose gradients are stacked, not added to zeros
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, is_causal=self.is_causal
        )
        packed = out.transpose(1, 2).flatten(2)
        return torch.ops.fbgemm.dense_to_jagged(packed, [self.offsets], qkv.shape[0])[0]
