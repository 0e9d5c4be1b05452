"""What bench_negatives.py compares: NegativeSampler and the ways to draw in PyTorch and numpy.

Ours gives log_q with the ids, and can leave out what a row excludes; the others give ids alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from popularity import draw_sets, zipf_counts
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.ops import NegativeSampler

ALPHA = 0.75
EXCLUDED_PER_ROW = 50
MULTINOMIAL_ROWS = 8  # of the form per row, which visits every item for each


@dataclass(frozen=True)
class Size:
    num_items: int
    num_rows: int
    num_negatives: int


@dataclass(frozen=True)
class Problem:
    distribution: str
    size: Size
    counts: Tensor  # (num_items,) float64
    weights: Tensor  # (num_items,) float64 on the CPU, what items are drawn in proportion to
    exclude: Jagged  # items of the same distribution
    device: str

    @property
    def num_draws(self) -> int:
        return self.size.num_rows * self.size.num_negatives


def build_problem(distribution: str, size: Size, device: str) -> Problem:
    counts = zipf_counts(size.num_items)
    if distribution == "unigram":
        weights = counts**ALPHA
    elif distribution == "log_uniform":
        weights = (1 / torch.arange(1, size.num_items + 1, dtype=torch.float64)).log1p()
    else:
        weights = torch.ones_like(counts)
    exclude = draw_sets(weights, size.num_rows, EXCLUDED_PER_ROW, seed=1)
    exclude = exclude.to(torch.device(device))
    return Problem(distribution, size, counts, weights, exclude, device)


@dataclass(frozen=True)
class Sampling:
    draw: Callable[[], object]
    num_draws: int  # of one call
    is_serial: bool = True  # uses one thread, however many torch has


# --- ours ---------------------------------------------------------------------------------------


def _build_sampler(problem: Problem) -> NegativeSampler:
    of_unigram: dict[str, Any] = {"counts": problem.counts, "alpha": ALPHA}
    return NegativeSampler(
        problem.size.num_items,
        problem.size.num_negatives,
        distribution=problem.distribution,
        **(of_unigram if problem.distribution == "unigram" else {}),
    )


def _ours(problem: Problem, exclude: Jagged | None = None) -> Sampling:
    sampler, steps = _build_sampler(problem), itertools.count()
    num_rows, device = problem.size.num_rows, problem.device
    return Sampling(
        lambda: sampler.sample(num_rows, step=next(steps), exclude=exclude, device=device),
        problem.num_draws,
        is_serial=False,
    )


def _ours_excluding(problem: Problem) -> Sampling:
    return _ours(problem, problem.exclude)


def _ours_shared(problem: Problem, unique: bool = False) -> Sampling:
    sampler, steps = _build_sampler(problem), itertools.count()
    return Sampling(
        lambda: sampler.sample_shared(step=next(steps), unique=unique, device=problem.device),
        problem.size.num_negatives,
        is_serial=False,
    )


# --- others, of a row each ----------------------------------------------------------------------


def _multinomial(problem: Problem) -> Sampling:
    """As if all rows were one."""
    weights = problem.weights.float().to(problem.device)
    num_draws = problem.num_draws
    return Sampling(lambda: torch.multinomial(weights, num_draws, replacement=True), num_draws)


def _multinomial_per_row(problem: Problem) -> Sampling:
    """Of a few rows."""
    num_rows, num_draws = min(MULTINOMIAL_ROWS, problem.size.num_rows), problem.size.num_negatives
    weights = problem.weights.float().to(problem.device).expand(num_rows, -1)
    return Sampling(
        lambda: torch.multinomial(weights, num_draws, replacement=True), num_rows * num_draws
    )


def _numpy_choice(problem: Problem) -> Sampling:
    generator = np.random.default_rng(0)
    shape = (problem.size.num_rows, problem.size.num_negatives)
    p = (problem.weights / problem.weights.sum()).numpy()
    return Sampling(lambda: generator.choice(len(p), shape, p=p), problem.num_draws)


def _numpy_integers(problem: Problem) -> Sampling:
    generator = np.random.default_rng(0)
    shape = (problem.size.num_rows, problem.size.num_negatives)
    return Sampling(
        lambda: generator.integers(problem.size.num_items, size=shape), problem.num_draws
    )


def _randint(problem: Problem) -> Sampling:
    shape = (problem.size.num_rows, problem.size.num_negatives)
    num_items, device = problem.size.num_items, problem.device
    return Sampling(lambda: torch.randint(num_items, shape, device=device), problem.num_draws)


def _closed_form(problem: Problem) -> Sampling:
    """floor(exp(u log(n + 1))) − 1, TensorFlow's log-uniform sampler, in float64 as it is there."""
    shape = (problem.size.num_rows, problem.size.num_negatives)
    scale = math.log(problem.size.num_items + 1)

    def draw() -> Tensor:
        uniform = torch.rand(shape, dtype=torch.float64, device=problem.device)
        return uniform.mul_(scale).exp_().long().sub_(1)

    return Sampling(draw, problem.num_draws, is_serial=False)


# --- others, one set of distinct items for all rows ---------------------------------------------


def _torch_unique(problem: Problem) -> Sampling:
    """Draws again for those that came out twice."""
    weights, num_wanted = problem.weights.float().to(problem.device), problem.size.num_negatives

    def draw() -> Tensor:
        items = torch.multinomial(weights, num_wanted, replacement=True).unique()
        while len(items) < num_wanted:
            more = torch.multinomial(weights, num_wanted - len(items), replacement=True)
            items = torch.cat([items, more]).unique()
        return items

    return Sampling(draw, num_wanted)


def _numpy_unique(problem: Problem) -> Sampling:
    """As _torch_unique, with the running sum of the weights made beforehand."""
    generator, num_wanted = np.random.default_rng(0), problem.size.num_negatives
    running = np.cumsum(problem.weights.numpy())

    def some(num_draws: int) -> Any:
        return np.searchsorted(running, generator.random(num_draws) * running[-1], side="right")

    def draw() -> object:
        items = np.unique(some(num_wanted))
        while len(items) < num_wanted:
            items = np.unique(np.concatenate([items, some(num_wanted - len(items))]))
        return items

    return Sampling(draw, num_wanted)


def _without_replacement(problem: Problem) -> Sampling:
    weights, num_draws = problem.weights.float().to(problem.device), problem.size.num_negatives
    return Sampling(lambda: torch.multinomial(weights, num_draws, replacement=False), num_draws)


Build = Callable[[Problem], Sampling]
OURS: dict[str, Build] = {"ours": _ours, "ours, excluding": _ours_excluding}
SAMPLERS: dict[str, dict[str, Build]] = {
    "unigram": OURS
    | {
        "multinomial": _multinomial,
        "multinomial per row": _multinomial_per_row,
        "numpy choice": _numpy_choice,
    },
    "log_uniform": OURS | {"multinomial": _multinomial, "closed form": _closed_form},
    "uniform": OURS | {"randint": _randint, "numpy integers": _numpy_integers},
    "shared": {
        "ours": _ours_shared,
        "ours, unique": functools.partial(_ours_shared, unique=True),
        "torch.unique loop": _torch_unique,
        "np.unique loop": _numpy_unique,
        "multinomial, no replacement": _without_replacement,
    },
}
