"""Interaction layers against their formulas, written out pair by pair."""

from __future__ import annotations

import itertools
import typing

import pytest
import torch
from torch import Tensor

from torchrec_pt.config import InteractionName
from torchrec_pt.models.interactions import (
    Cross,
    Interactions,
    build_interaction,
)

NAMES: tuple[InteractionName, ...] = typing.get_args(InteractionName)
DIM, NUM_PAIRS = 8, 5
every_layer = pytest.mark.parametrize("name", NAMES)


def _vectors(num_fields: int, num_pairs: int = NUM_PAIRS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    user, item = torch.randn(2, num_pairs, DIM)
    return user, item, torch.randn(num_pairs, num_fields, DIM)


def _written_out(name: InteractionName, user: Tensor, item: Tensor, fields: Tensor) -> Tensor:
    """Of one pair, float64."""
    vectors = [user, item, *fields]
    products = [a @ b for a, b in itertools.combinations(vectors, 2)]
    if name == "inner":
        return user @ item
    if name == "outer":
        return torch.stack([a * b for a in user for b in item])
    if name == "hadamard":
        return user * item
    if name == "concat":
        return torch.cat(vectors)
    if name == "fm":
        return torch.stack(products).sum()
    assert name == "dot"
    return torch.cat([user, torch.stack(products)])


@pytest.mark.parametrize("num_fields", [0, 1, 4])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "cross"])
def test_a_layer_is_its_formula(name: InteractionName, num_fields: int) -> None:
    layer = build_interaction(name, DIM, num_fields)
    vectors = _vectors(num_fields)
    got = layer(*vectors)
    expected = [_written_out(name, *(v[p].double() for v in vectors)) for p in range(NUM_PAIRS)]
    expected_rows = torch.stack([row.reshape(-1) for row in expected])
    assert got.shape == (NUM_PAIRS, layer.out_dim)
    torch.testing.assert_close(got.double(), expected_rows, rtol=1e-5, atol=1e-5)  # float32 sums


def test_cross_is_its_formula() -> None:
    layer = Cross(DIM, 2)
    vectors = _vectors(2)
    first = x = torch.cat([vectors[0], vectors[1], vectors[2].flatten(1)], dim=1)
    for w, v, bias in zip(
        layer.cross.W_kernels, layer.cross.V_kernels, layer.cross.bias, strict=True
    ):
        torch.nn.init.normal_(bias)
        x = first * (x @ v.T @ w.T + bias) + x
    torch.testing.assert_close(layer(*vectors), x)
    assert x.shape == (NUM_PAIRS, layer.out_dim)


@every_layer
def test_no_pairs_give_no_rows_and_a_gradient(name: InteractionName) -> None:
    layer = build_interaction(name, DIM, 2)
    out = layer(*_vectors(2, num_pairs=0))
    assert out.shape == (0, layer.out_dim)
    vectors = [v.requires_grad_() for v in _vectors(2)]
    layer(*vectors).square().sum().backward()
    assert all(v.grad is not None and torch.isfinite(v.grad).all() for v in vectors[:2])


def test_layers_side_by_side_are_the_layers() -> None:
    vectors = _vectors(3)
    several = Interactions(NAMES, DIM, 3)
    parts = several(*vectors).split([layer.out_dim for layer in several.layers.values()], dim=1)
    for layer, part in zip(several.layers.values(), parts, strict=True):
        assert torch.equal(layer(*vectors), part)
    assert several.out_dim == sum(part.shape[1] for part in parts)
