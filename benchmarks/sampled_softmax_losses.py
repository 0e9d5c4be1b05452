"""What bench_sampled_softmax.py compares: sampled_softmax_loss and the ways to write it in PyTorch.

All take the same query, table, positive, negatives and log_q, mask a negative that is the row's
positive, and give the gradients of query and table: a sparse one is coalesced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from popularity import draw, zipf_counts
from torch import Tensor

from torchrec_pt.ops import sampled_softmax_loss

ALPHA = 0.75
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Section:
    is_shared: bool = False  # negatives (M,) for all rows, else (B, M)
    is_sparse: bool = True  # the gradient of the table
    dtype: torch.dtype = torch.float32  # of query and table


SECTIONS = {
    "per row": Section(),
    "shared": Section(is_shared=True),
    "bfloat16": Section(dtype=torch.bfloat16),
    "dense gradient": Section(is_sparse=False),
}


@dataclass(frozen=True)
class Size:
    num_rows: int
    num_negatives: int
    dim: int
    num_items: int

    def __str__(self) -> str:
        return f"{self.num_rows}x{self.num_negatives}x{self.dim}, {self.num_items} items"


@dataclass(frozen=True)
class Problem:
    query: Tensor  # (B, D), rows of length 1, like those of table
    table: Tensor  # (num_items, D)
    positive: Tensor  # (B,) int64
    negatives: Tensor  # (B, M) or (M,) int64, drawn by unigram^0.75 like positive
    log_q: Tensor  # as negatives: the log of how often each is expected among M draws
    is_sparse: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.table, self.positive, self.negatives, self.log_q


def build_problem(section: Section, size: Size, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    weights = zipf_counts(size.num_items) ** ALPHA

    def vectors(num_vectors: int) -> Tensor:
        rows = F.normalize(torch.randn(num_vectors, size.dim, generator=generator))
        return rows.to(device, section.dtype).requires_grad_()

    num_sets = 1 if section.is_shared else size.num_rows
    negatives = draw(weights, num_sets * size.num_negatives, generator)
    log_q = (weights[negatives] / weights.sum() * size.num_negatives).log().float()
    shape = (size.num_negatives,) if section.is_shared else (num_sets, size.num_negatives)
    return Problem(
        vectors(size.num_rows),
        vectors(size.num_items),
        draw(weights, size.num_rows, generator).to(device),
        negatives.view(shape).to(device),
        log_q.view(shape).to(device),
        section.is_sparse,
    )


# --- the contestants ----------------------------------------------------------------------------


def _ours(problem: Problem) -> Tensor:
    return sampled_softmax_loss(
        problem.query,
        problem.table,
        problem.positive,
        problem.negatives,
        temperature=TEMPERATURE,
        log_q_negatives=problem.log_q,
        sparse=problem.is_sparse,
    )


def _item_ids(positive: Tensor, negatives: Tensor) -> Tensor:
    """Of the rows to gather: (B, 1 + M), or (B + M,) where negatives are shared."""
    if negatives.dim() == 1:
        return torch.cat([positive, negatives])
    return torch.cat([positive[:, None], negatives], dim=1)


def _loss_of_rows(
    query: Tensor, rows: Tensor, positive: Tensor, negatives: Tensor, log_q: Tensor
) -> Tensor:
    """`rows` are those of _item_ids."""
    if negatives.dim() == 1:
        own, others = rows.split([positive.shape[0], negatives.shape[0]])
        logits = torch.cat([(query * own).sum(1, keepdim=True), query @ others.T], dim=1)
    else:
        logits = torch.einsum("bd,bmd->bm", query, rows)  # (B, 1 + M)
    logits = logits.to(log_q.dtype) / TEMPERATURE
    of_negatives = (logits[:, 1:] - log_q).masked_fill(negatives == positive[:, None], -torch.inf)
    logits = torch.cat([logits[:, :1], of_negatives], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(positive))


def _eager_loss(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negatives: Tensor,
    log_q: Tensor,
    is_sparse: bool,
) -> Tensor:
    rows = F.embedding(_item_ids(positive, negatives), table, sparse=is_sparse)
    return _loss_of_rows(query, rows, positive, negatives, log_q)


def eager(problem: Problem) -> Tensor:
    return _eager_loss(*problem.tensors, problem.is_sparse)


def _eager_of_distinct_items(problem: Problem) -> Tensor:
    """Gathers a row of the table once, then from those: the table's gradient is born coalesced."""
    query, table, positive, negatives, log_q = problem.tensors
    items, places = _item_ids(positive, negatives).unique(return_inverse=True)
    distinct = F.embedding(items, table, sparse=problem.is_sparse)
    rows = F.embedding(places, distinct)
    return _loss_of_rows(query, rows, positive, negatives, log_q)


def _index_select(problem: Problem) -> Tensor:
    query, table, positive, negatives, log_q = problem.tensors
    ids = _item_ids(positive, negatives)
    rows = table.index_select(0, ids.flatten()).view(*ids.shape, -1)
    return _loss_of_rows(query, rows, positive, negatives, log_q)


@functools.cache
def _compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(loss, dynamic=False)  # dynamic shapes would be slower


def _all_compiled(problem: Problem) -> Tensor:
    return _compiled(_eager_loss)(*problem.tensors, problem.is_sparse)


def _compiled_after_gather(problem: Problem) -> Tensor:
    query, table, positive, negatives, log_q = problem.tensors
    rows = F.embedding(_item_ids(positive, negatives), table, sparse=problem.is_sparse)
    return _compiled(_loss_of_rows)(query, rows, positive, negatives, log_q)


@dataclass(frozen=True)
class Contestant:
    loss: Callable[[Problem], Tensor]
    is_compiled: bool = False

    def gradients(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Of query and table."""
        return self.loss_and_gradients(problem)[1:]

    def loss_and_gradients(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        loss = self.loss(problem)
        of_query, of_table = torch.autograd.grad(loss, (problem.query, problem.table))
        return loss.detach(), of_query, of_table.coalesce() if of_table.is_sparse else of_table


SPARSE = {
    "ours": Contestant(_ours),
    "eager": Contestant(eager),
    "eager, distinct items": Contestant(_eager_of_distinct_items),
    "compiled after the gather": Contestant(_compiled_after_gather, is_compiled=True),
    "torch.compile": Contestant(_all_compiled, is_compiled=True),
}
DENSE = {
    "ours": Contestant(_ours),
    "eager": Contestant(eager),
    "index_select": Contestant(_index_select),
    "torch.compile": Contestant(_all_compiled, is_compiled=True),
}


def section_contestants(section: str) -> dict[str, Contestant]:
    return SPARSE if SECTIONS[section].is_sparse else DENSE
