"""The ranks of a run and the few collectives of our own, with exact gradients.

Convention: every rank differentiates the SUM of the loss over all rows of the
global batch. A collective's backward therefore sums over ranks, and nothing
here averages; DDP and TorchRec do, which `learner` undoes once, in the scale.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part_of(self, num: int) -> tuple[int, int]:
        """[begin, end) of this rank when `num` rows are cut into equal ranges (the last short).

        The rows per rank are ceil(num / world_size), as TorchRec's row_wise sharding cuts.
        """
        size = -(-num // self.world_size)
        return min(self.rank * size, num), min((self.rank + 1) * size, num)


def join_ranks() -> Ranks:
    """Join the process group of torchrun or Ray Train, or be alone in a group of one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    return Ranks(
        rank=dist.get_rank(),
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        device=device,
    )


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """`join_ranks`, and leave at the end what was joined here."""
    was_joined = dist.is_initialized()
    try:
        yield join_ranks()
    finally:
        if dist.is_initialized() and not was_joined:
            # Sharded modules hold the group in reference cycles. Then its threads would outlive
            # it, and one that lets go of a tensor while the interpreter ends aborts the process.
            gc.collect()
            dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """All-reduced copy of x; no gradient."""
    x = x.detach().clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, in rank order, on every rank; `group`: a group of all of them."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value, group=group)
    return out


@contextlib.contextmanager
def raised_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What a user can mend, met by any rank inside the block, is raised on every rank at its end.

    The same on all: that of the first rank that met something. A barrier besides: all ranks leave
    the block together.
    """
    failure: OSError | ValueError | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        failure = error
    failures = gather_objects(failure, group)
    first = next((rank for rank, one in enumerate(failures) if one is not None), None)
    if first is not None:
        raise failures[first] if failure is None or first != dist.get_rank() else failure


def gather_integers(values: Sequence[int], device: torch.device) -> list[list[int]]:
    """The same number of integers (of 64 bits) of each rank, in rank order."""
    table = torch.zeros(dist.get_world_size(), len(values), dtype=torch.int64, device=device)
    table[dist.get_rank()] = torch.tensor(values, device=device)
    return sum_over_ranks(table).tolist()


def gather_rows(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """Rows of all ranks, in rank order. The gradient of a row sums over the ranks that used it.

    Args:
        x: (B_r, …) on each rank; the B_r may differ.
        counts: the B_r where they are known already, which saves a collective.
    Returns:
        (Σ B_r, …)
    """
    if dist.get_world_size() == 1:
        return x
    if counts is None:
        counts = [count for (count,) in gather_integers([x.shape[0]], x.device)]
    return _GatherRows.apply(x, counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        gathered = x.new_empty((len(sizes) * longest, *x.shape[1:]))
        dist.all_gather_single(gathered, padded)
        blocks = gathered.unflatten(0, (len(sizes), longest))
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        longest = max(ctx.sizes)
        padded = grad.new_zeros((len(ctx.sizes), longest, *grad.shape[1:]))
        for block, part, size in zip(padded, grad.split(ctx.sizes), ctx.sizes, strict=True):
            block[:size] = part
        mine = grad.new_empty((longest, *grad.shape[1:]))
        dist.reduce_scatter_single(mine, padded.flatten(0, 1))
        return mine[: ctx.sizes[dist.get_rank()]], None


def start_ring_exchange(sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[dist.Work]:
    """Begin to send to the next rank and to receive from the one before, the last from the first.

    Args:
        sent: contiguous tensors, left alone until the exchange is over. Empty ones do not travel.
        received: contiguous tensors of the shapes and dtypes that the rank before sends.
    Returns:
        The exchange is over when each of these has been waited for.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    to, source = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    steps = [dist.P2POp(dist.isend, tensor, to) for tensor in sent if tensor.numel()]
    steps += [dist.P2POp(dist.irecv, tensor, source) for tensor in received if tensor.numel()]
    return dist.batch_isend_irecv(steps) if steps else []


def logsumexp_over_ranks(lse: Tensor) -> Tensor:
    """Merge the partial logsumexps of disjoint ranges of keys, one range a rank.

    Args:
        lse: (B,) of this rank's range, for the rows of all ranks; −inf where it has none.
    Returns:
        (B,), equal on every rank. Its gradient with respect to this rank's `lse` is the
        softmax share exp(lse_r − lse); nothing is summed over ranks, since each rank holds
        the whole loss already.
    """
    if dist.get_world_size() == 1:
        return lse
    return _LogsumexpOverRanks.apply(lse)


class _LogsumexpOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lse: Tensor) -> Tensor:
        largest = lse.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        share = torch.exp(lse - largest)
        total = share.clone()
        dist.all_reduce(total)
        ctx.save_for_backward(share / total)
        return largest + torch.log(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (share,) = ctx.saved_tensors
        return grad * share


def owned_sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over ranks whose gradient stays with each rank (the counterpart of the above)."""
    if dist.get_world_size() == 1:
        return x
    return _OwnedSum.apply(x)


class _OwnedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
