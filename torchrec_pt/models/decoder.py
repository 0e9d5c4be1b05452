"""A causal decoder that reads an encoded sequence (Vaswani et al. 2017, section 3.1), one layer.

Tokens stay packed, as in `transformer`; the two attentions alone are padded.
"""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import TransformerConfig
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.transformer import Attention, Block, reset_linear_layers
from torchrec_pt.rng import RowNoise


class Decoder(nn.Module):
    """Of every item a vector made of those before it and of the encoded sequence.

    Widths, heads and dropout are those of the transformer. Positions count from the first item:
    the decoder is not told how many are to come.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.begin = nn.Parameter(torch.empty(config.dim))
        self.position = nn.Parameter(torch.empty(config.max_length, config.dim))
        self.block = Block(config.dim, config.num_heads, config.ffn_dim or 4 * config.dim)
        self.cross = CrossAttention(config.dim, config.num_heads)
        self.norm = nn.LayerNorm(config.dim)
        reset_linear_layers(self)
        nn.init.normal_(self.begin, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, items: Jagged, encoded: Jagged, noise: RowNoise | None) -> Tensor:
        """The vector at a place has not seen the item there, nor those after it.

        Args:
            items: (T, D) item vectors in R rows of at most max_length.
            encoded: (S, D) in as many rows; empty only where the row of `items` is empty too.
            noise: dropout's randomness, one row a row; None for no dropout.
        Returns:
            (T, D)
        """
        row, position = items.rows, items.positions
        shifted = items.values.roll(1, 0)
        x = torch.where(position.unsqueeze(1) == 0, self.begin, shifted)
        # Indexing would add up its gradient in the order in which threads come.
        x = x + F.embedding(position, self.position)
        drop = RowDropout(self.dropout, noise, "decoder.dropout", row, position)
        x = self.block.attend(drop(x), Attention(items.offsets, is_causal=True), drop)
        x = x + drop(self.cross(items.with_values(x), encoded))
        return self.norm(self.block.feed_forward(x, drop))


class CrossAttention(nn.Module):
    """From LN(x) to an encoded sequence, within the rows of a packed batch."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Jagged, encoded: Jagged) -> Tensor:
        """(T, D) tokens and (S, D) encoded ones -> (T, D)"""
        query = self.query(self.norm(x.values))
        key_value = self.key_value(encoded.values)
        if not len(query):  # DDP wants the same graph from a rank without a token
            return self.out(query + key_value[:, : query.shape[1]])
        lengths = encoded.lengths
        padded = self._heads(encoded.with_values(key_value), 2)
        columns = torch.arange(padded.shape[3], device=lengths.device)
        is_key = columns < lengths.clamp(min=1).unsqueeze(1)
        out = F.scaled_dot_product_attention(
            self._heads(x.with_values(query), 1)[0],
            padded[0],
            padded[1],
            attn_mask=is_key[:, None, None, :],
        )
        packed = out.transpose(1, 2).flatten(2)
        return self.out(torch.ops.fbgemm.dense_to_jagged(packed, [x.offsets], len(query))[0])

    def _heads(self, tokens: Jagged, num: int) -> Tensor:
        """(T, num · D) -> (num, R, num_heads, longest, D / num_heads)"""
        longest = int(tokens.lengths.max())
        padded = torch.ops.fbgemm.jagged_to_padded_dense(
            tokens.values, [tokens.offsets], [longest], 0.0
        )
        return padded.unflatten(2, (num, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
