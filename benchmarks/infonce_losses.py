"""What bench_infonce.py compares: infonce, the ways to write it in PyTorch, the bare products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchrec_pt.ops import infonce_loss

TEMPERATURE = 0.1
CHUNK_ROWS = 1024
BLOCKS = {"cpu": (32, 64, 128, 256), "cuda": (256, 1024, 4096)}
PROBE_ROWS = 1024  # the rows on which the block of the products is chosen


@dataclass(frozen=True)
class Problem:
    """Row i's own key is key i; `options` are all masks and corrections that infonce takes."""

    query: Tensor  # (N, D), rows of length 1, like those of keys
    keys: Tensor
    target: Tensor
    options: dict[str, Tensor]

    def with_options(self) -> dict[str, Tensor]:
        """The leaves that have a gradient when every option is on."""
        return {"query": self.query, "keys": self.keys} | {
            name: self.options[name] for name in ("temperature", "key_bias")
        }

    def without_options(self) -> dict[str, Tensor]:
        return {"query": self.query, "keys": self.keys}


def build_problem(num_rows: int, dim: int, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def rows() -> Tensor:
        vectors = torch.randn(num_rows, dim, generator=generator)
        return F.normalize(vectors).to(device).requires_grad_()

    def ids(num_ids: int) -> Tensor:
        return torch.randint(num_ids, (num_rows,), generator=generator).to(device)

    def normal() -> Tensor:
        return torch.randn(num_rows, generator=generator).to(device)

    query_ids = ids(max(num_rows // 4, 1))  # four rows of each user
    options = {
        "temperature": torch.tensor(TEMPERATURE, device=device).requires_grad_(),
        "log_q": normal(),
        "key_ids": ids(num_rows),
        "query_ids": query_ids,
        "key_query_ids": query_ids,
        "self_index": ids(num_rows),
        "log_q_positive": normal(),
        "key_bias": normal().requires_grad_(),
    }
    return Problem(rows(), rows(), torch.arange(num_rows, device=device), options)


# --- the contestants ----------------------------------------------------------------------------


def _ours(problem: Problem) -> Tensor:
    return infonce_loss(problem.query, problem.keys, problem.target, temperature=TEMPERATURE)


def _ours_with_options(problem: Problem) -> Tensor:
    options: dict[str, Any] = dict(problem.options)
    return infonce_loss(problem.query, problem.keys, problem.target, **options)


def _ours_symmetric(problem: Problem) -> Tensor:
    return infonce_loss(problem.query, problem.keys, temperature=TEMPERATURE, symmetric=True)


def _linear_cross_entropy(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(query / TEMPERATURE, keys, target, options=options)


def _eager(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(query @ keys.T / TEMPERATURE, target)


def _eager_symmetric(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    logits = query @ keys.T / TEMPERATURE
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _chunked(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    """Logits of CHUNK_ROWS rows at a time, made again in backward."""
    total = query.new_zeros(())
    for rows, targets in zip(query.split(CHUNK_ROWS), target.split(CHUNK_ROWS), strict=True):
        loss = checkpoint(_eager, rows, keys, targets, use_reentrant=False)
        total = total + loss * rows.shape[0]
    return total / query.shape[0]


@functools.cache
def _compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(loss, dynamic=False)  # dynamic shapes would be slower


@dataclass(frozen=True)
class Contestant:
    loss: Callable[[Problem], Tensor]
    leaves: Callable[[Problem], dict[str, Tensor]] = Problem.without_options

    def forward(self, problem: Problem) -> Tensor:
        with torch.no_grad():
            return self.loss(problem)

    def gradients(self, problem: Problem) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(problem), tuple(self.leaves(problem).values()))


def _of(loss: Callable[..., Tensor]) -> Contestant:
    return Contestant(lambda problem: loss(problem.query, problem.keys, problem.target))


def _both_ways(loss: Callable[..., Tensor]) -> Contestant:
    """The symmetric loss as the average of two of one direction."""

    def both(query: Tensor, keys: Tensor, target: Tensor) -> Tensor:
        return (loss(query, keys, target) + loss(keys, query, target)) / 2

    return _of(both)


ONE_DIRECTION = {
    "ours": Contestant(_ours),
    "ours, every option": Contestant(_ours_with_options, Problem.with_options),
    "linear_cross_entropy": _of(_linear_cross_entropy),
    "eager": _of(_eager),
    "torch.compile": _of(lambda *tensors: _compiled(_eager)(*tensors)),
    "chunked": _of(_chunked),
}
SYMMETRIC = {
    "ours": Contestant(_ours_symmetric),
    "linear_cross_entropy": _both_ways(_linear_cross_entropy),
    "eager": _of(_eager_symmetric),
    "torch.compile": _of(lambda *tensors: _compiled(_eager_symmetric)(*tensors)),
    "chunked": _both_ways(_chunked),
}
CONTESTANTS = {"one-direction": ONE_DIRECTION, "symmetric": SYMMETRIC}


# --- the bare products --------------------------------------------------------------------------


@dataclass
class Products:
    """The matrix products of a loss and nothing else, in row blocks through one reused buffer.

    Gradients go into tensors that are kept from call to call, so no memory is asked for.
    """

    problem: Problem
    block: int
    grad_query: Tensor = field(init=False)
    grad_keys: Tensor = field(init=False)
    buffer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        query, keys = self.problem.query, self.problem.keys
        self.grad_query, self.grad_keys = torch.empty_like(query), torch.empty_like(keys)
        self.buffer = query.new_empty((self.block, keys.shape[0]))

    @torch.no_grad()
    def one(self, num_rows: int | None = None) -> None:
        """z = q kᵀ."""
        for start in self._starts(num_rows):
            self._logits(start)

    @torch.no_grad()
    def three(self, num_rows: int | None = None) -> None:
        """z = q kᵀ, dq = z k, dk += zᵀ q."""
        query, keys = self.problem.query, self.problem.keys
        self.grad_keys.zero_()
        for start in self._starts(num_rows):
            logits = self._logits(start)
            rows = slice(start, start + logits.shape[0])
            torch.mm(logits, keys, out=self.grad_query[rows])
            self.grad_keys.addmm_(logits.T, query[rows])

    def four(self, num_rows: int | None = None) -> None:
        """z = q kᵀ of all blocks, then again with both gradients."""
        self.one(num_rows)
        self.three(num_rows)

    def _starts(self, num_rows: int | None) -> range:
        return range(0, self.problem.query.shape[0] if num_rows is None else num_rows, self.block)

    def _logits(self, start: int) -> Tensor:
        rows = self.problem.query[start : start + self.block]
        return torch.mm(rows, self.problem.keys.T, out=self.buffer[: rows.shape[0]])


PRODUCTS = {
    "forward": Products.one,
    "one-direction": Products.three,
    "scaling": Products.three,
    "symmetric": Products.four,
}


def best_products(
    section: str, problem: Problem, elapsed_ms: Callable[[Callable[[], object]], float]
) -> Products:
    """With the fastest block, by the best of three short runs each."""
    num_rows = min(PROBE_ROWS, problem.query.shape[0])
    blocks = [Products(problem, block) for block in BLOCKS[problem.query.device.type]]

    def best_ms(products: Products) -> float:
        step = functools.partial(PRODUCTS[section], products, num_rows)
        step()
        return min(elapsed_ms(step) for _ in range(3))

    return min(blocks, key=best_ms)
