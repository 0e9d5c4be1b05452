"""Rotations and biases of attention: what they depend on, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchrec_pt.config import TransformerConfig
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.positions import Rotary, time_bucket
from torchrec_pt.models.transformer import Transformer

DIM, MAX_LENGTH = 16, 6
LENGTHS = (3, 0, 5, 1, 4)
ATTENTION = pytest.mark.parametrize("attention", ["causal", "bidirectional"])


def _model(attention: str, positions: str = "relative_time") -> Transformer:
    raw = {"dim": DIM, "max_length": MAX_LENGTH, "attention": attention, "positions": positions}
    model = Transformer(TransformerConfig.model_validate(raw), num_items=10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta:  # wide enough that every part of the sum is seen
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def _tokens(times: Tensor | None, lengths: tuple[int, ...] = LENGTHS) -> Jagged:
    values = torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(1))
    return Jagged.from_lengths(values, torch.tensor(lengths, dtype=torch.int64), times)


def _times() -> Tensor:
    """Ascending in each row, as histories are."""
    steps = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(2))
    return torch.exp(14 * steps.double()).cumsum(0).floor()


def _users(model: Transformer, history: Jagged, is_masked: Tensor | None = None) -> Tensor:
    nobody = torch.full((history.num_rows,), -1)
    return model.encode_users(nobody, history, is_masked=is_masked)


def test_a_turned_query_and_key_know_their_distance_alone() -> None:
    rotary = Rotary(8, 20)
    query, key = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(0))

    def product(i: int, j: int) -> Tensor:
        turned = rotary(query, torch.tensor([i])) * rotary(key, torch.tensor([j]))
        return turned.sum(2)

    # float32 cosines of angles up to 19
    torch.testing.assert_close(product(9, 5), product(19, 15), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(product(3, 3), (query * key).sum(2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(product(9, 5), product(9, 6))
    assert not torch.allclose(product(9, 5), product(5, 9))


@ATTENTION
@pytest.mark.parametrize("positions", ["rotary", "relative_time"])
def test_attention_tells_the_order_of_the_items(attention: str, positions: str) -> None:
    model, history = _model(attention, positions), _tokens(None, (4,))
    swapped = history.with_values(history.values[[1, 0, 2, 3]])
    assert not torch.allclose(_users(model, swapped), _users(model, history), atol=1e-4)


@ATTENTION
def test_rotary_has_no_table_of_positions_and_pays_no_heed_to_times(attention: str) -> None:
    model = _model(attention, "rotary")
    names = {name for name, _ in model.named_parameters()}
    assert not [name for name in names if "position" in name]
    assert not model.reads_times
    assert torch.equal(_users(model, _tokens(_times())), _users(model, _tokens(None)))


@ATTENTION
def test_times_count_by_their_differences(attention: str) -> None:
    model = _model(attention)
    users = _users(model, _tokens(_times()))
    assert torch.equal(_users(model, _tokens(_times() + 2.0**31)), users)
    stretched = _users(model, _tokens(10 * _times()))
    # A row of one item has no differences.
    assert (stretched - users).abs().amax(1).gt(1e-4).tolist() == [True, False, True, False, True]


@ATTENTION
def test_without_times_there_is_no_difference_between_them(attention: str) -> None:
    model = _model(attention)
    users = _users(model, _tokens(None))
    unknown = torch.full((sum(LENGTHS),), torch.nan).double()
    assert torch.equal(_users(model, _tokens(unknown)), users)
    # The same bias for all keys is none: only the rounding of the logits changes.
    torch.testing.assert_close(_users(model, _tokens(0 * _times())), users, rtol=1e-4, atol=1e-5)


@ATTENTION
def test_a_time_that_is_not_known_tells_itself_from_those_that_are(attention: str) -> None:
    model, times = _model(attention), _times()
    users = _users(model, _tokens(times))
    times[3] = torch.nan
    some = _users(model, _tokens(times))
    assert torch.isfinite(some).all()
    assert (some - users).abs().amax(1).gt(1e-4).tolist() == [False, False, True, False, False]


@ATTENTION
def test_the_time_of_a_hidden_item_is_hidden(attention: str) -> None:
    model, times = _model(attention), _times()
    is_masked = torch.zeros(len(times), dtype=torch.bool)
    is_masked[[0, 4, 5, 12]] = True  # the first of a row, two in a run, the last
    tokens = _tokens(times)
    users = _users(model, tokens, is_masked)
    encoded = model.encode_positions(tokens, None, is_masked=is_masked)
    for changed in (times + 1e6 * is_masked, times.masked_fill(is_masked, torch.nan)):
        other = _tokens(changed)
        assert torch.equal(_users(model, other, is_masked), users)
        assert torch.equal(model.encode_positions(other, None, is_masked=is_masked), encoded)


def test_a_causal_item_pays_no_heed_to_later_times() -> None:
    model, times = _model("causal"), _times()
    before = model.encode_positions(_tokens(times), None)
    times[7] += 1e9  # the last of the third row
    after = model.encode_positions(_tokens(times), None)
    assert (before - after).abs().amax(1).gt(1e-4).nonzero().tolist() == [[7]]


@ATTENTION
def test_a_rank_without_items_has_gradients_of_the_same_parameters(attention: str) -> None:
    def learned(lengths: tuple[int, ...]) -> set[str]:
        model = _model(attention)
        history = _tokens(None, lengths)
        is_masked = torch.zeros(len(history.values), dtype=torch.bool)
        _users(model, history, is_masked).sum().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    assert learned((0, 0)) == learned((3, 1))


def test_buckets_are_logarithmic_and_the_last_is_for_what_is_not_known() -> None:
    between = torch.tensor([0.0, -0.7, 1.3, 1.4, -1.4, 3600.0, 1e12, 1e30, torch.inf, torch.nan])
    expected = [0, 0, 0, 1, 1, math.floor(math.log(3600) / 0.301), 91, 127, 127, 128]
    assert time_bucket(between).tolist() == expected


def test_an_odd_width_of_heads_is_refused_by_one_line() -> None:
    with pytest.raises(ValueError, match="must be even, given 24 / 8; change num_heads"):
        TransformerConfig(dim=24, num_heads=8, positions="rotary")
    TransformerConfig(dim=24, num_heads=8, positions="relative_time")


@ATTENTION
def test_gradients_have_the_same_bits_each_time_on_two_threads(attention: str) -> None:
    config = TransformerConfig.model_validate(
        {"dim": 64, "max_length": 50, "attention": attention, "positions": "relative_time"}
    )
    model = Transformer(config, 2)
    times = torch.arange(32 * 50).double().square()
    tokens = Jagged.from_lengths(torch.randn(32 * 50, 64), torch.full((32,), 50), times)
    parameters = [p for p in model.parameters() if not p.is_meta and p is not model.mask]

    def gradients() -> list[Tensor]:
        loss = model.encode_positions(tokens, None).square().sum()
        return list(torch.autograd.grad(loss, parameters))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients()
        for _ in range(5):
            assert all(map(torch.equal, gradients(), first))
    finally:
        torch.set_num_threads(threads)
