"""The decoder: what each place may see, and that rows do not touch each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torchrec_pt.config import TransformerConfig
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.decoder import CrossAttention, Decoder
from torchrec_pt.rng import RowNoise

CONFIG = TransformerConfig(dim=16, num_heads=2, max_length=6, dropout=0.5)
ITEMS, ENCODED = [4, 0, 6, 1], [3, 0, 1, 2]


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def _jagged(lengths: list[int], seed: int = 0) -> Jagged:
    values = torch.randn(sum(lengths), 16, generator=torch.Generator().manual_seed(seed))
    return Jagged.from_lengths(values, torch.tensor(lengths, dtype=torch.int64))


def test_a_place_sees_the_items_before_it_and_not_itself(decoder: Decoder) -> None:
    items, encoded = _jagged(ITEMS), _jagged(ENCODED, 1)
    values = items.values.clone().requires_grad_()
    out = decoder(items.with_values(values), encoded, None)
    row, position = items.rows, items.positions
    for place in range(len(values)):
        (gradient,) = torch.autograd.grad(out[place].square().sum(), values, retain_graph=True)
        seen = (row == row[place]) & (position < position[place])
        assert torch.equal((gradient != 0).any(1), seen)


def test_a_place_sees_all_that_is_encoded_of_its_row(decoder: Decoder) -> None:
    items, encoded = _jagged(ITEMS), _jagged(ENCODED, 1)
    values = encoded.values.clone().requires_grad_()
    out = decoder(items, encoded.with_values(values), None)
    for place in range(len(out)):
        (gradient,) = torch.autograd.grad(out[place].square().sum(), values, retain_graph=True)
        assert torch.equal((gradient != 0).any(1), encoded.rows == items.rows[place])


def test_cross_attention_is_softmax_attention_written_out() -> None:
    torch.manual_seed(0)
    cross = CrossAttention(16, 2)
    items, encoded = _jagged(ITEMS), _jagged(ENCODED, 1)
    got = cross(items, encoded)
    query = cross.query(cross.norm(items.values)).view(-1, 2, 8)
    key, value = cross.key_value(encoded.values).view(-1, 2, 2, 8).unbind(1)
    for place, row in enumerate(items.rows.tolist()):
        own = encoded.rows == row
        heads = [
            F.softmax(key[own, head] @ query[place, head] / 8**0.5, 0) @ value[own, head]
            for head in range(2)
        ]
        torch.testing.assert_close(got[place], cross.out(torch.cat(heads)))


def test_a_row_comes_out_the_same_alone_with_its_dropout(decoder: Decoder) -> None:
    items, encoded = _jagged(ITEMS), _jagged(ENCODED, 1)
    together = decoder(items, encoded, RowNoise(0, 7, torch.arange(4)))
    rows = torch.tensor([3, 2])
    alone = decoder(items.select(rows), encoded.select(rows), RowNoise(0, 7, rows))
    expected = items.with_values(together).select(rows).values
    torch.testing.assert_close(alone, expected)
    assert not torch.allclose(decoder(items, encoded, None), together)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_without_a_token_every_parameter_is_in_the_graph(
    decoder: Decoder, lengths: list[int]
) -> None:
    empty = _jagged(lengths)
    out = decoder(empty, empty, RowNoise(0, 0, torch.arange(len(lengths))))
    assert out.shape == (0, 16)
    out.sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
