"""Losses over the keys of all ranks, with gradients, from as many processes as are asked for.

python across_ranks.py OUT.pt RANKS …
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from torchrec_pt.distributed import gather_objects
from torchrec_pt.global_negatives import (
    AcrossRanks,
    Keys,
    gather_keys,
    gathered_infonce_loss,
    symmetric_infonce_loss,
)
from torchrec_pt.ring import ring_infonce_loss

LOSSES: dict[str, AcrossRanks] = {"gather": gathered_infonce_loss, "ring": ring_infonce_loss}
# Of each number of ranks, who holds how many of the rows.
CUTS = {
    1: {"uneven": [23]},
    2: {"uneven": [9, 14], "one empty": [23, 0]},
    3: {"uneven": [2, 14, 7], "one empty": [11, 0, 12]},
    4: {"uneven": [1, 8, 3, 11], "one empty": [0, 9, 6, 8]},
}
NUM_ROWS = 23
BIG = 2**31  # ids above it must be told apart, also from their low 32 bits
IDS = [BIG * 4 + 7, BIG * 2 + 7, 7, BIG - 1, -3, 0]
MEMORY_RANKS, MEMORY_KEYS, MEMORY_DIM = 4, 64, 4096
BLOCK_BYTES = MEMORY_KEYS * MEMORY_DIM * 4


@dataclass(frozen=True)
class Problem:
    """The whole batch. Row i has 1 + i % 2 keys where `has_more_keys`, its positive the last."""

    query: Tensor
    keys: Keys
    temperature: Tensor
    has_more_keys: bool = False
    query_ids: Tensor | None = None
    self_index: Tensor | None = None
    log_q_positive: Tensor | None = None
    row_weight: Tensor | None = None
    upstream: Tensor | None = None  # of the rows; else their sum is differentiated
    is_symmetric: bool = False

    @property
    def keys_of_row(self) -> Tensor:
        return 1 + torch.arange(NUM_ROWS) % 2 * self.has_more_keys

    @property
    def target(self) -> Tensor:
        return self.keys_of_row.cumsum(0) - 1


def problems() -> dict[str, Problem]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def ids(size: int) -> Tensor:
        return torch.tensor(IDS)[torch.randint(len(IDS), (size,), generator=generator)]

    def plain(num_keys: int = NUM_ROWS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        return {
            "query": normal(NUM_ROWS, 24).to(dtype),
            "keys": Keys(normal(num_keys, 24).to(dtype)),
            "temperature": torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32)),
        }

    def with_everything(dtype: torch.dtype) -> Problem:
        num_keys = NUM_ROWS + NUM_ROWS // 2
        parts = plain(num_keys, dtype)
        log_q = normal(num_keys)
        log_q[::7] = torch.inf
        row_weight = torch.rand(NUM_ROWS, generator=generator)
        row_weight[::5] = 0
        parts["query"][[5, 10]] = torch.tensor([[torch.nan], [torch.inf]], dtype=dtype)
        bias = normal(num_keys).to(dtype)
        keys = parts.pop("keys")._replace(
            ids=ids(num_keys), log_q=log_q, query_ids=ids(num_keys), key_bias=bias
        )
        return Problem(
            **parts,
            keys=keys,
            has_more_keys=True,
            query_ids=ids(NUM_ROWS),
            self_index=torch.randint(-1, num_keys + 1, (NUM_ROWS,), generator=generator),
            log_q_positive=normal(NUM_ROWS),
            row_weight=row_weight,
            upstream=normal(NUM_ROWS),
        )

    def with_fields(**fields: Tensor) -> dict[str, Any]:
        parts = plain()
        return {**parts, "keys": parts["keys"]._replace(**fields)}

    weight = torch.ones(NUM_ROWS)
    weight[::4] = 0
    symmetric = with_fields(
        ids=ids(NUM_ROWS),
        log_q=normal(NUM_ROWS),
        query_ids=ids(NUM_ROWS),
        key_bias=normal(NUM_ROWS),
    )
    symmetric["query"][::4] = torch.nan
    return {
        "plain": Problem(**plain()),
        "ids": Problem(**with_fields(ids=ids(NUM_ROWS))),
        "one id": Problem(**with_fields(ids=torch.full((NUM_ROWS,), BIG))),
        "query ids": Problem(**with_fields(query_ids=ids(NUM_ROWS)), query_ids=ids(NUM_ROWS)),
        "self index": Problem(**plain(), self_index=torch.arange(NUM_ROWS).roll(3)),
        "everything": with_everything(torch.float32),
        "everything, float64": with_everything(torch.float64),
        "everything, bfloat16": with_everything(torch.bfloat16),
        "symmetric": Problem(**plain(), is_symmetric=True),
        "symmetric, everything": Problem(
            **symmetric,
            query_ids=ids(NUM_ROWS),
            log_q_positive=normal(NUM_ROWS),
            row_weight=weight,
            is_symmetric=True,
        ),
    }


def _part(whole: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if whole is None else whole[begin:end].clone()


def solve(problem: Problem, loss: AcrossRanks, cut: list[int]) -> dict[str, Tensor]:
    """This rank's losses and gradients."""
    rank = dist.get_rank()
    begin, end = sum(cut[:rank]), sum(cut[: rank + 1])
    first = int(problem.keys_of_row[:begin].sum())
    last = int(problem.keys_of_row[:end].sum())
    rows = functools.partial(_part, begin=begin, end=end)
    keys = problem.keys.each(lambda field: field[first:last].clone())
    leaves = {
        "query": problem.query[begin:end].clone(),
        "keys": keys.vectors,
        "temperature": problem.temperature.clone(),
    }
    if keys.key_bias is not None:
        leaves["key_bias"] = keys.key_bias
    for leaf in leaves.values():
        leaf.requires_grad_()
    options = {
        "temperature": leaves["temperature"],
        "query_ids": rows(problem.query_ids),
        "log_q_positive": rows(problem.log_q_positive),
        "row_weight": rows(problem.row_weight),
        "reduction": "sum" if problem.upstream is None else "none",
    }
    if problem.is_symmetric:
        got = symmetric_infonce_loss(loss, leaves["query"], keys, **options)
    else:
        options["self_index"] = rows(problem.self_index)
        target = problem.target[begin:end] - first if problem.has_more_keys else None
        got = loss(leaves["query"], keys, target, **options)
    total = got if problem.upstream is None else (got * problem.upstream[begin:end]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True), loss=got.detach())


def put_together(problem: Problem, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole batch's losses and gradients from those that each rank has."""
    is_summed = {"temperature"} | ({"loss"} if problem.upstream is None else set())
    return {
        name: sum((part[name] for part in parts), torch.zeros(()))
        if name in is_summed
        else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "none"


def refusals() -> dict[str, list[str]]:
    """What each rank says to keys that differ between the ranks in one respect."""
    rank = dist.get_rank()
    vectors = torch.ones(2, 8)
    different = {
        "dim": Keys(torch.ones(2, 8 + rank)),
        "dtype": Keys(vectors.double() if rank else vectors),
        "fields": Keys(vectors, ids=torch.arange(2) if rank else None),
    }
    return {
        f"{way}, {name}": gather_objects(
            _refusal(functools.partial(loss, keys.vectors, keys, temperature=1.0))
        )
        for way, loss in LOSSES.items()
        for name, keys in different.items()
    }


def gathered() -> dict[str, Any]:
    """Rank r has r keys, of (r, 2) ids."""
    rank = dist.get_rank()
    keys, first = gather_keys(Keys(torch.full((rank, 3), float(rank)), ids=torch.full((rank,), 9)))
    none, _ = gather_keys(Keys(torch.ones(0, 3, requires_grad=True)))
    none.vectors.sum().backward()
    return {"first": gather_objects(first), "keys": tuple(keys), "no keys": none.vectors.detach()}


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that torch's allocator had handed out at a time, over what it had before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for num_bytes in (event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())):
        now += num_bytes
        most = max(most, now)
    return most


def memory(loss: AcrossRanks) -> list[tuple[int, int]]:
    """Of each rank: the bytes at the peak of forward and of backward; one query, many keys."""
    keys = torch.randn(MEMORY_KEYS, MEMORY_DIM, requires_grad=True)
    query = torch.randn(1, MEMORY_DIM, requires_grad=True)
    found: list[Tensor] = []
    forward = peak_bytes(lambda: found.append(loss(query, Keys(keys), temperature=100.0)))
    backward = peak_bytes(lambda: torch.autograd.grad(found[0], [query, keys]))
    return gather_objects((forward, backward))


def _work(rank: int, num_ranks: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=num_ranks)
    results: dict[str, Any] = {"refusals": refusals(), "gathered": gathered()}
    if num_ranks == MEMORY_RANKS:
        results["memory"] = {way: memory(loss) for way, loss in LOSSES.items()}
    cases = {
        f"{cut}, {name}, {way}": (problem, loss, rows)
        for cut, rows in CUTS[num_ranks].items()
        for name, problem in problems().items()
        for way, loss in LOSSES.items()
    }
    solved = gather_objects({name: solve(*case) for name, case in cases.items()})
    repeated = "uneven, everything, ring"
    again = solve(*cases[repeated])
    is_same = all(torch.equal(again[part], x) for part, x in solved[rank][repeated].items())
    results["is deterministic"] = all(gather_objects(is_same))
    for name, (problem, *_) in cases.items():
        results[name] = put_together(problem, [found[name] for found in solved])
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def main(out: Path, counts: list[int]) -> None:
    """OUT.pt.NUM_RANKS for each number of ranks. Forks, since torch is slow to import."""
    for num_ranks in counts:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                _work,
                (num_ranks, f"{folder}/store", Path(f"{out}.{num_ranks}")),
                nprocs=num_ranks,
                start_method="fork",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]])
