"""The transformer's contract, and every number against attention written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchrec_pt.config import TransformerConfig
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.rng import RowNoise

DIM, MAX_LENGTH = 16, 6
LENGTHS = (3, 0, 5, 1, 4)
ATTENTION = pytest.mark.parametrize("attention", ["causal", "bidirectional"])
POSITIONS = pytest.mark.parametrize("positions", ["learned", "rotary", "relative_time"])


def _model(attention: str, dropout: float = 0.0, positions: str = "learned") -> Transformer:
    config = TransformerConfig(
        dim=DIM, num_layers=2, num_heads=2, max_length=MAX_LENGTH, attention=attention,
        dropout=dropout, positions=positions,
    )  # fmt: skip
    model = Transformer(config, num_items=10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                # Wide enough that every part of the sum is seen in the result.
                offset = 1.0 if name.endswith("norm.weight") else 0.0
                parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def _history(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> Jagged:
    values = torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(seed))
    return Jagged.from_lengths(values, torch.tensor(lengths, dtype=torch.int64))


def _users(
    model: Transformer,
    history: Jagged,
    noise: RowNoise | None = None,
    is_masked: Tensor | None = None,
) -> Tensor:
    nobody = torch.full((history.num_rows,), -1)
    return model.encode_users(nobody, history, noise, is_masked=is_masked)


def _row(jagged: Jagged, row: int) -> Tensor:
    return jagged.values[jagged.offsets[row] : jagged.offsets[row + 1]]


def _naive_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
    return centred / deviation * norm.weight.double() + norm.bias.double()


def _naive_linear(x: Tensor, linear: torch.nn.Linear) -> Tensor:
    return x @ linear.weight.double().T + linear.bias.double()


def _naive_turned(head: Tensor) -> Tensor:
    """(L, d) by the complex numbers of RoPE's equation 12, counted from the end."""
    length, pairs = len(head), head.shape[1] // 2
    numbers = torch.complex(head[:, :pairs], head[:, pairs:])
    frequency = torch.tensor([10_000.0 ** (-i / pairs) for i in range(pairs)]).double()
    steps = torch.arange(length).double() - (length - 1)
    turned = numbers * torch.polar(
        torch.ones(length, pairs).double(), torch.outer(steps, frequency)
    )
    return torch.cat([turned.real, turned.imag], 1)


def _naive_bias(model: Transformer, head: int, i: int, j: int, times: Tensor) -> Tensor:
    assert model.relative is not None
    between = abs(float(times[i]) - float(times[j]))
    bucket = 128 if math.isnan(between) else min(127, int(math.log(max(1.0, between)) / 0.301))
    middle = 0 if model.is_causal else MAX_LENGTH - 1
    by_distance = model.relative.distance[head, i - j + middle]
    return by_distance.double() + model.relative.elapsed[head, bucket]


def _naive_positions(model: Transformer, tokens: Tensor, times: Tensor | None = None) -> Tensor:
    """One row (L, D), no packing or padding, in float64."""
    length, head_dim = len(tokens), DIM // 2
    x = tokens.double()
    if model.position is not None:
        x = x + model.position[MAX_LENGTH - length :].double()
    for block in model.blocks:
        q, k, v = _naive_linear(_naive_norm(x, block.attention_norm), block.qkv).split(DIM, 1)
        heads = []
        for head in range(2):
            part = slice(head * head_dim, (head + 1) * head_dim)
            query, key = q[:, part], k[:, part]
            if model.rotary is not None:
                query, key = _naive_turned(query), _naive_turned(key)
            mixed = []
            for i in range(length):
                last = i + 1 if model.is_causal else length
                logits = key[:last] @ query[i] / math.sqrt(head_dim)
                if model.relative is not None:
                    assert times is not None
                    biases = [_naive_bias(model, head, i, j, times) for j in range(last)]
                    logits = logits + torch.stack(biases)
                weight = torch.exp(logits)
                mixed.append(weight / weight.sum() @ v[:last, part])
            heads.append(torch.stack(mixed))
        x = x + _naive_linear(torch.cat(heads, 1), block.out)
        hidden = _naive_linear(_naive_norm(x, block.ffn_norm), block.ffn_in)
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + _naive_linear(hidden, block.ffn_out)
    return _naive_norm(x, model.norm)


@ATTENTION
@POSITIONS
def test_positions_match_attention_written_out(attention: str, positions: str) -> None:
    model, history = _model(attention, positions=positions), _history()
    nan = torch.nan
    times = torch.tensor([0, 1.4, 90, 7, 7, nan, 9e5, 1e12, 3, 2, 5e20, 9, 11]).double()
    history = Jagged(history.values, history.offsets, times)
    is_masked = torch.arange(len(history.values)) % 3 == 1
    got = model.encode_positions(history, None, is_masked=is_masked)
    tokens = history.values.clone()
    tokens[is_masked] = model.mask.detach()
    # A hidden token has the time of the one before it.
    times[[1, 4, 7, 10]] = torch.tensor([0, 7, 9e5, 2]).double()
    rows = [
        (_row(history.with_values(tokens), r), _row(Jagged(times, history.offsets), r))
        for r, length in enumerate(LENGTHS)
        if length
    ]
    expected = torch.cat([_naive_positions(model, *row) for row in rows])
    # float32 against float64, behind a last norm that keeps values near 1
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@ATTENTION
def test_users_match_the_last_position_of_a_history_of_their_own(attention: str) -> None:
    model, history = _model(attention), _history()
    got = _users(model, history)
    for row, length in enumerate(LENGTHS):
        tokens = _row(history, row)
        if attention == "bidirectional":
            tokens = torch.cat([tokens, model.mask.detach().unsqueeze(0)])
        expected = torch.zeros(DIM).double()
        if len(tokens):
            expected = _naive_positions(model, tokens)[-1]
        # float32 against float64, as above
        torch.testing.assert_close(got[row].double(), expected, rtol=1e-5, atol=1e-5)
        assert bool((got[row] == 0).all()) == (attention == "causal" and length == 0)


@ATTENTION
@POSITIONS
def test_users_are_the_last_positions_with_the_same_dropout(attention: str, positions: str) -> None:
    model = _model(attention, dropout=0.3, positions=positions)
    times = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(2)).double() * 100
    history = Jagged.from_lengths(_history().values, torch.tensor(LENGTHS), times)
    noise = RowNoise(0, 5, torch.arange(5))
    got = _users(model, history, noise)
    is_masked = None
    if not model.is_causal:
        # The mask appended by hand: an item of its own, at a time that is not known.
        ends = [_row(history, r) for r in range(5)]
        tokens = [torch.cat([end, torch.zeros(1, DIM)]) for end in ends]
        seen = [_row(Jagged(times, history.offsets), r) for r in range(5)]
        times = torch.cat([torch.cat([each, torch.tensor([torch.nan])]) for each in seen])
        history = Jagged.from_lengths(torch.cat(tokens), torch.tensor(LENGTHS) + 1, times)
        is_masked = torch.zeros(len(history.values), dtype=torch.bool)
        is_masked[history.offsets[1:] - 1] = True
    every = model.encode_positions(history, noise, is_masked=is_masked)
    for row in torch.arange(5)[history.lengths > 0]:
        last = every[history.offsets[row + 1] - 1]
        # The same sums in another order.
        torch.testing.assert_close(got[row], last, rtol=1e-5, atol=1e-5)


@ATTENTION
def test_a_user_does_not_depend_on_who_shares_the_batch(attention: str) -> None:
    model, history = _model(attention), _history()
    together = _users(model, history)
    order = torch.tensor([4, 2, 0])
    torch.testing.assert_close(_users(model, history.select(order)), together[order])
    strangers = Jagged.stack([_history((MAX_LENGTH - 1,), seed=9), history])
    torch.testing.assert_close(_users(model, strangers)[1:], together)
    for row in range(len(LENGTHS)):
        alone = _users(model, history.select(torch.tensor([row])))
        torch.testing.assert_close(alone[0], together[row])


@ATTENTION
def test_no_gradient_flows_between_users(attention: str) -> None:
    model, history = _model(attention), _history()
    values = history.values.requires_grad_()
    _users(model, history.with_values(values))[2].square().sum().backward()
    is_own = history.rows == 2
    assert values.grad is not None
    assert (values.grad[~is_own] == 0).all()
    assert (values.grad[is_own] != 0).any(1).all()


@ATTENTION
def test_causal_never_sees_later_tokens_and_bidirectional_does(attention: str) -> None:
    model, history = _model(attention), _history((5,))
    before = model.encode_positions(history, None)
    changed = history.values.clone()
    changed[3] *= -1  # a constant added to all of it would vanish in the layer norms
    after = model.encode_positions(history.with_values(changed), None)
    is_changed = (before - after).abs().amax(1) > 1e-4
    earlier = attention == "bidirectional"
    assert is_changed.tolist() == [earlier, earlier, earlier, True, True]
    if not earlier:
        assert torch.equal(before[:3], after[:3])


@ATTENTION
def test_empty_histories_alone_are_allowed(attention: str) -> None:
    model = _model(attention)
    users = _users(model, _history((0, 0)))
    assert users.shape == (2, DIM)
    assert torch.equal(users[0], users[1])
    assert (users == 0).all() == (attention == "causal")
    assert _users(model, _history(())).shape == (0, DIM)
    assert model.encode_positions(_history((0, 0)), None).shape == (0, DIM)


@ATTENTION
def test_the_longest_history_that_is_read_fills_all_positions(attention: str) -> None:
    model = _model(attention)
    assert model.history_length == MAX_LENGTH - (attention == "bidirectional")
    assert model.position is not None
    _users(model, _history((model.history_length, 1))).square().sum().backward()
    assert model.position.grad is not None
    assert (model.position.grad != 0).any(1).all()


@ATTENTION
def test_the_newest_item_takes_the_same_position_in_any_history(attention: str) -> None:
    model = _model(attention)
    _users(model, _history((1,))).square().sum().backward()
    assert model.position is not None
    assert model.position.grad is not None
    used = (model.position.grad != 0).any(1)
    num_tokens = 2 if attention == "bidirectional" else 1
    assert used.tolist() == [False] * (MAX_LENGTH - num_tokens) + [True] * num_tokens


@ATTENTION
def test_dropout_acts_only_with_noise_and_follows_the_global_row(attention: str) -> None:
    model, history = _model(attention, dropout=0.3), _history()
    model.train()
    assert torch.equal(_users(model, history), _users(_model(attention), history))
    noise = RowNoise(0, 5, torch.arange(5))
    dropped = _users(model, history, noise)
    assert ((dropped - _users(model, history)).abs().amax(1) > 1e-4)[[0, 2, 3, 4]].all()
    assert torch.equal(_users(model, history, noise), dropped)
    rows = torch.tensor([4, 0])
    alone = _users(model, history.select(rows), RowNoise(0, 5, rows))
    torch.testing.assert_close(alone, dropped[rows])
    other_step = _users(model, history, RowNoise(0, 6, torch.arange(5)))
    assert not torch.allclose(other_step, dropped)


@ATTENTION
def test_a_masked_token_is_replaced_by_the_mask_vector(attention: str) -> None:
    model, history = _model(attention), _history()
    is_masked = torch.zeros(len(history.values), dtype=torch.bool)
    is_masked[[1, 5]] = True
    values = history.values.clone()
    values[is_masked] = 1e6
    poisoned = _users(model, history.with_values(values), is_masked=is_masked)
    values[is_masked] = model.mask.detach()
    assert torch.equal(poisoned, _users(model, history.with_values(values)))


@ATTENTION
def test_gradients_reach_every_parameter(attention: str) -> None:
    model, history = _model(attention), _history((MAX_LENGTH - 1, MAX_LENGTH - 1))
    noise = RowNoise(0, 0, torch.arange(2))
    is_masked = history.positions == 2
    out = model.encode_positions(history, noise, is_masked=is_masked).square().sum()
    longest = _history((model.history_length,))
    (out + _users(model, longest).square().sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue  # the item table, which is looked up outside
        assert parameter.grad is not None, name
        if name.endswith("qkv.bias"):
            # Softmax does not see a constant added to every key, so the keys' third is idle.
            grad = parameter.grad.unflatten(0, (3, DIM))[[0, 2]]
        else:
            grad = parameter.grad
        assert (grad != 0).all(), name


def test_item_vectors_are_the_rows_of_the_table() -> None:
    rows = torch.randn(3, DIM)
    assert torch.equal(_model("causal").encode_items(torch.arange(len(rows)), rows), rows)


def test_gradients_have_the_same_bits_each_time_on_two_threads() -> None:
    config = TransformerConfig(dim=64, num_layers=1, max_length=100, dropout=0.2)
    backbone = Transformer(config, 2)
    vectors = torch.randn(32 * 100, 64)
    tokens = Jagged.from_lengths(vectors, torch.full((32,), 100))
    noise = RowNoise(0, 0, torch.arange(32))
    parameters = [p for name, p in backbone.named_parameters() if "items" not in name]

    def gradients() -> list[torch.Tensor]:
        out = backbone.encode_positions(tokens, noise, is_masked=torch.arange(3200) % 5 == 0)
        return list(torch.autograd.grad(out.square().sum(), parameters))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients()
        for _ in range(10):
            assert all(map(torch.equal, gradients(), first))
    finally:
        torch.set_num_threads(threads)
