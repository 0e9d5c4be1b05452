"""The ranks of a run and the few collectives of our own, with exact gradients.

Convention: every rank differentiates the SUM of the loss over all rows of the
global batch. A collective's backward therefore sums over ranks, and nothing
here averages; DDP and TorchRec do, which `learner` undoes once, in the scale.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# For the ranks to find each other, and for a collective between ranks that do the same. A rank
# that dies is noticed at once, by its closed connections; this ends the wait for one that hangs.
TIMEOUT = datetime.timedelta(minutes=10)
# For what one rank does while the others wait (`raised_together`), as preparing the data.
PATIENCE = datetime.timedelta(days=7)


class JoinError(ValueError):
    """The ranks do not find each other; the message is one line."""


class LostWorkerError(RuntimeError):
    """Another rank is gone or hangs; the message is one line."""


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
    """Join the process group of torchrun or Ray Train, or be alone in a group of one.

    Raises:
        JoinError: an environment that names no group, or ranks that do not come within `TIMEOUT`.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            _join_by_environment(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    return Ranks(
        rank=dist.get_rank(),
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        device=device,
    )


def _join_by_environment(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        if dist.get_rank() >= dist.get_world_size():
            raise ValueError("RANK must be below WORLD_SIZE")
    except (ValueError, RuntimeError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise JoinError(
            f"{given}: cannot join the other ranks, {_reason(error)}; start WORLD_SIZE processes "
            "with the ranks from 0 and the same address, or let --workers or torchrun do it"
        ) from error


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """`join_ranks`, and leave at the end what was joined here.

    Raises:
        LostWorkerError: for what the backend says where another rank is gone.
    """
    was_joined = dist.is_initialized()
    try:
        yield join_ranks()
    except RuntimeError as error:
        if not _is_of_lost_worker(error):
            raise
        raise LostWorkerError(f"lost another worker ({_reason(error)})") from error
    finally:
        if dist.is_initialized() and not was_joined:
            # Sharded modules hold the group in reference cycles. Then its threads would outlive
            # it, and one that lets go of a tensor while the interpreter ends aborts the process.
            gc.collect()
            dist.destroy_process_group()


def _is_of_lost_worker(error: RuntimeError) -> bool:
    """Whether NCCL, or gloo, whose errors have no type but name its source file, raised it."""
    return isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)


def _reason(error: Exception) -> str:
    """The first sentence, without the file that gloo puts before it and the advice after it."""
    return re.sub(r"^\[\S*\] ", "", str(error).split("\n")[0].split(". ")[0]).rstrip(".")


def is_first_to_fail() -> bool:
    """Whether no other rank of the group asked this before."""
    try:
        return bool(dist.distributed_c10d._get_default_store().add("failed ranks", 1) == 1)
    except RuntimeError:  # gone with the rank that kept the store
        return True


def sum_over_ranks(x: Tensor) -> Tensor:
    """All-reduced copy of x, on its device; no gradient."""
    total = x.detach().clone()
    if dist.get_world_size() > 1:
        if dist.get_backend() == dist.Backend.NCCL:  # which knows no tensor of the CPU
            total = total.cuda()
        dist.all_reduce(total)
    return total.to(x.device)


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
    _wait_for_ranks(PATIENCE, group)
    failures = gather_objects(failure, group)
    first = next((rank for rank, one in enumerate(failures) if one is not None), None)
    if first is not None:
        raise failures[first] if failure is None or first != dist.get_rank() else failure


def _wait_for_ranks(longest: datetime.timedelta, group: dist.ProcessGroup | None) -> None:
    """A barrier with a timeout of its own."""
    options = dist.BarrierOptions()
    options.timeout = longest
    group = group or dist.group.WORLD
    assert group is not None
    group.barrier(options).wait()


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


def gather_each(x: Tensor) -> list[Tensor]:
    """The x (B_r, …) of each rank, in rank order; no gradient."""
    if dist.get_world_size() == 1:
        return [x]
    counts = [count for (count,) in gather_integers([len(x)], x.device)]
    return list(gather_rows(x.detach(), counts).split(counts))


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
