"""What every backbone promises to objectives, tasks, evaluation and export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchrec_pt.build import build_backbone
from torchrec_pt.config import AutoencoderConfig, ModelConfig, TransformerConfig, TwoTowerConfig
from torchrec_pt.data.batch import lookup_ids
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.precision import multiply_in_bf16
from torchrec_pt.rng import RowNoise

DIM, MAX_LENGTH = 16, 6
LENGTHS = (3, 0, 5, 1, 4)
USERS = torch.tensor([4, 0, -1, 2, 4])


def _positions(attention: Any, positions: Any, dropout: float) -> TransformerConfig:
    return TransformerConfig(
        dim=DIM, max_length=MAX_LENGTH, attention=attention, positions=positions, dropout=dropout
    )


BACKBONES: dict[str, Callable[[float], ModelConfig]] = {
    "causal transformer": lambda dropout: TransformerConfig(
        dim=DIM, num_layers=2, max_length=MAX_LENGTH, attention="causal", dropout=dropout
    ),
    "bidirectional transformer": lambda dropout: TransformerConfig(
        dim=DIM, num_layers=2, max_length=MAX_LENGTH, dropout=dropout
    ),
    "causal rotary transformer": lambda dropout: _positions("causal", "rotary", dropout),
    "rotary transformer": lambda dropout: _positions("bidirectional", "rotary", dropout),
    "causal timed transformer": lambda dropout: _positions("causal", "relative_time", dropout),
    "timed transformer": lambda dropout: _positions("bidirectional", "relative_time", dropout),
    "cosine transformer": lambda dropout: TransformerConfig(
        dim=DIM, max_length=MAX_LENGTH, similarity="cosine", dropout=dropout
    ),
    "two towers": lambda dropout: TwoTowerConfig(
        backbone="two_tower", dim=DIM, hidden_dims=(12,), max_length=MAX_LENGTH, dropout=dropout
    ),
    "autoencoder": lambda dropout: AutoencoderConfig(
        backbone="autoencoder",
        dim=DIM,
        hidden_dims=(12, 8),
        max_length=MAX_LENGTH,
        dropout=dropout,
    ),
    "linear variational autoencoder": lambda dropout: AutoencoderConfig(
        backbone="autoencoder",
        dim=DIM,
        hidden_dims=(),
        variational=True,
        max_length=MAX_LENGTH,
        dropout=dropout,
    ),
}

pytestmark = [
    pytest.mark.parametrize("name", list(BACKBONES)),
    pytest.mark.parametrize("data", ["cycle", "cycle_with_features"]),
]


@pytest.fixture
def build(name: str, data: str, request: pytest.FixtureRequest) -> Callable[..., Backbone]:
    dataset: PreparedDataset = request.getfixturevalue(data)

    def build(dropout: float = 0.0, seed: int = 0) -> Backbone:
        torch.manual_seed(seed)
        backbone = build_backbone(BACKBONES[name](dropout), dataset)
        backbone.items.collection.to_empty(device=torch.device("cpu"))
        torch.nn.init.normal_(backbone.items.weight)
        return backbone

    return build


def _history(backbone: Backbone, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> Jagged:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), backbone.items.dim, generator=generator)
    times = 1e6 * torch.rand(sum(lengths), dtype=torch.float64, generator=generator)
    times[::4] = torch.nan  # not known
    return Jagged.from_lengths(values, torch.tensor(lengths, dtype=torch.int64), times)


def _items(backbone: Backbone, ids: Tensor) -> Tensor:
    return backbone.encode_items(ids, backbone.represent(ids, backbone.items.weight[ids]))


def test_users_and_items_are_vectors_of_one_width(build: Callable[..., Backbone]) -> None:
    backbone = build()
    ids = torch.arange(backbone.items.num_items)
    assert backbone.encode_users(USERS, _history(backbone)).shape == (5, DIM)
    assert _items(backbone, ids).shape == (len(ids), DIM)
    assert backbone.dim == DIM
    assert 1 <= backbone.history_length <= MAX_LENGTH


def test_nobody_and_nothing_have_no_rows(build: Callable[..., Backbone]) -> None:
    backbone = build()
    none = torch.zeros(0, dtype=torch.int64)
    assert backbone.encode_users(none, _history(backbone, ())).shape == (0, DIM)
    assert _items(backbone, none).shape == (0, DIM)


def test_an_empty_history_gives_a_finite_vector(build: Callable[..., Backbone]) -> None:
    backbone = build()
    users = backbone.encode_users(torch.tensor([-1, 1]), _history(backbone, (0, 0)))
    assert torch.isfinite(users).all()
    assert users.requires_grad  # DDP wants the same graph from a rank that has only such rows


def test_the_longest_history_is_read(build: Callable[..., Backbone]) -> None:
    backbone = build()
    history = _history(backbone, (backbone.history_length,))
    changed = history.values.clone()
    changed[0] = changed[0].flip(0)
    one = torch.tensor([0])
    before = backbone.encode_users(one, history)
    assert not torch.equal(backbone.encode_users(one, history.with_values(changed)), before)


def test_a_vector_does_not_depend_on_its_neighbours(build: Callable[..., Backbone]) -> None:
    backbone = build()
    history = _history(backbone)
    together = backbone.encode_users(USERS, history)
    for row in range(5):
        rows = torch.tensor([row])
        alone = backbone.encode_users(USERS[rows], history.select(rows))
        torch.testing.assert_close(alone[0], together[row])
    ids = torch.tensor([3, 9, 3])
    torch.testing.assert_close(_items(backbone, ids)[1], _items(backbone, ids[1:2])[0])


def test_the_same_seed_builds_the_same_model(build: Callable[..., Backbone]) -> None:
    history = _history(build())
    first, again, other = (build(seed=seed).encode_users(USERS, history) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_belongs_to_the_row_and_the_step(build: Callable[..., Backbone]) -> None:
    backbone = build(dropout=0.5)
    history = _history(backbone)
    noise = RowNoise(0, 7, torch.arange(5))
    dropped = backbone.encode_users(USERS, history, noise)
    assert torch.equal(backbone.encode_users(USERS, history, noise), dropped)
    rows = torch.tensor([4, 2])
    alone = backbone.encode_users(USERS[rows], history.select(rows), RowNoise(0, 7, rows))
    torch.testing.assert_close(alone, dropped[rows])
    others = [
        backbone.encode_users(USERS, history),
        backbone.encode_users(USERS, history, RowNoise(0, 8, torch.arange(5))),
        backbone.encode_users(USERS, history, RowNoise(1, 7, torch.arange(5))),
    ]
    for other in others:
        assert ((other - dropped).abs().amax(1) > 1e-4)[[0, 2, 3, 4]].all()


def test_a_hidden_item_is_not_read(build: Callable[..., Backbone]) -> None:
    backbone = build()
    history = _history(backbone)
    is_masked = torch.zeros(len(history.values), dtype=torch.bool)
    is_masked[[1, 5]] = True
    changed = torch.where(is_masked.unsqueeze(1), 100.0, history.values)
    expected = backbone.encode_users(USERS, history, is_masked=is_masked)
    got = backbone.encode_users(USERS, history.with_values(changed), is_masked=is_masked)
    assert torch.equal(got, expected)
    assert not torch.equal(backbone.encode_users(USERS, history), expected)


def test_every_parameter_learns_from_users_and_items(build: Callable[..., Backbone]) -> None:
    backbone = build()
    history = _history(backbone)
    is_masked = torch.zeros(len(history.values), dtype=torch.bool)
    is_masked[1] = True
    ids = torch.arange(backbone.items.num_items)
    rows = backbone.represent(ids, backbone.items(lookup_ids(ids)))
    noise = RowNoise(0, 0, torch.arange(5))  # for what only a sample of the user needs
    users = backbone.encode_users(torch.arange(5), history, noise, is_masked=is_masked)
    (users @ backbone.encode_items(ids, rows).T).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_saved_model_comes_back_as_it_was(build: Callable[..., Backbone]) -> None:
    backbone, other = build(seed=0), build(seed=1)
    other.load_state_dict(backbone.state_dict())
    history, ids = _history(backbone), torch.arange(10)
    assert torch.equal(other.encode_users(USERS, history), backbone.encode_users(USERS, history))
    assert torch.equal(_items(other, ids), _items(backbone, ids))


def test_two_threads_give_the_same_bits_every_time(build: Callable[..., Backbone]) -> None:
    def gradients(num_threads: int) -> list[Tensor]:
        torch.set_num_threads(num_threads)
        try:
            backbone = build(dropout=0.2)
            ids = torch.arange(300) % backbone.items.num_items
            history = _history(backbone, (5,) * 60)
            users = backbone.encode_users(ids[:60], history, RowNoise(0, 0, torch.arange(60)))
            items = backbone.encode_items(ids, backbone.items(lookup_ids(ids)))
            (users @ items.T).logsumexp(1).sum().backward()
            return [p.grad for p in backbone.parameters() if p.grad is not None]
        finally:
            torch.set_num_threads(1)

    first = gradients(2)
    for _ in range(3):
        assert all(map(torch.equal, gradients(2), first))


def test_trained_in_bf16_it_gives_float32_vectors_near_those_of_float32(
    build: Callable[..., Backbone],
) -> None:
    backbone = build(dropout=0.5)
    history = _history(backbone)
    noise = RowNoise(0, 7, torch.arange(5))
    ids = torch.arange(backbone.items.num_items)

    def vectors() -> Tensor:
        return torch.cat([backbone.encode_users(USERS, history, noise), _items(backbone, ids)])

    expected = vectors()
    multiply_in_bf16(backbone)
    got = vectors()
    assert got.dtype == torch.float32
    # Two layers, each a few roundings to 8 bits of numbers of size 1
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    got.square().sum().backward()
    assert {p.grad.dtype for p in backbone.parameters() if p.grad is not None} == {torch.float32}
    backbone.eval()
    assert vectors().equal(expected)


def test_every_parameter_is_in_one_group_of_layers(build: Callable[..., Backbone]) -> None:
    backbone = build()
    names = [n for group in backbone.layers() for part in group.values() for n in part]
    for parameter, _ in backbone.named_parameters():
        assert sum(f"{parameter}.".startswith(f"{name}.") for name in names) == 1, parameter
    assert "items" in backbone.layers()[0]["item table"]
