"""Run by torchrun: two nodes of two ranks, in TorchRec's eyes, look up and update pooled tables.

TorchRec shards them so on CUDA alone; a sharder offers it on CPU here. Every rank looks up
another number of items.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import comm

from torchrec_pt.config import TrainConfig
from torchrec_pt.data.batch import lookup_ids
from torchrec_pt.distributed import Ranks, gather_objects, joined_ranks
from torchrec_pt.models.item_bags import ItemBagsSharder
from torchrec_pt.models.item_table import ItemTable
from torchrec_pt.optim import Optimizers
from torchrec_pt.placement import POOLED, Placement
from torchrec_pt.sharding import fill_item_table, shard

NUM_ITEMS, DIM, RATE = 50, 16, 0.1
CASES = {
    ("table_row_wise", "rowwise_adagrad"): (2, [25, DIM]),
    ("table_row_wise", "adagrad"): (2, [25, DIM]),
    ("grid", "adagrad"): (4, [25, DIM // 2]),
    ("grid", "sgd"): (4, [25, DIM // 2]),
}


def main() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    ItemBagsSharder.sharding_types = lambda *_: [*POOLED, "grid_shard"]  # type: ignore[method-assign]
    dist.all_gather = _all_gather
    with joined_ranks() as ranks:
        for (kind, optimizer), (num_shards, size) in CASES.items():
            expected, known = _trained(Placement("row_wise", optimizer), ranks)
            got, state = _trained(Placement(kind, optimizer), ranks)
            torch.testing.assert_close(got, expected)
            assert _sizes(state) == _sizes(known)
            weight = state["0.collection.embeddings.item.weight"]
            assert isinstance(weight, ShardedTensor)
            shards = weight.metadata().shards_metadata
            assert [part.shard_sizes for part in shards] == [size] * num_shards
        comm._INTRA_PG = comm._CROSS_PG = None  # their threads would outlive the group


def _trained(placement: Placement, ranks: Ranks) -> tuple[list[Tensor], dict[str, Any]]:
    """The rows that two steps looked up, then the whole table; what a checkpoint would hold."""
    table, train = ItemTable(NUM_ITEMS, DIM), TrainConfig(learning_rate=RATE)
    model = shard(nn.Sequential(table), placement, train, ranks)
    fill_item_table(model, seed=1)
    optimizers = Optimizers(model, train, placement, num_steps=2)
    torch.manual_seed(ranks.rank)
    seen = []
    for step, num in enumerate((3 + 2 * ranks.rank, 4)):  # uneven over the ranks, and even
        optimizers.prepare(step)
        rows = table(lookup_ids(torch.randint(NUM_ITEMS, (num,))))
        seen.append(rows.detach().clone())
        rows.backward(torch.randn(num, DIM))
    seen.append(table.rows(0, NUM_ITEMS).detach().clone())
    return seen, model.state_dict() | optimizers.state()


def _sizes(state: dict[str, Any]) -> dict[str, torch.Size]:
    """A rank that holds no part of a table has no state of it."""
    parts = gather_objects({name: value.size() for name, value in state.items()})
    return {name: size for part in parts for name, size in part.items()}


def _all_gather(
    parts: list[Tensor], mine: Tensor, group: dist.ProcessGroup, async_op: bool
) -> dist.Work:
    """As NCCL's, of parts of unlike lengths."""
    parts[dist.get_rank(group)].copy_(mine)
    works = [
        dist.broadcast(part, group=group, group_src=place, async_op=async_op)
        for place, part in enumerate(parts)
    ]
    for work in works[:-1]:
        work.wait()
    return works[-1]


if __name__ == "__main__":
    main()
