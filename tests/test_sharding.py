"""A sharded table's lookup and fused update are those of the plain table."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from torchrec_pt.config import TrainConfig
from torchrec_pt.data.batch import lookup_ids
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.models.item_table import ItemTable
from torchrec_pt.placement import Placement
from torchrec_pt.sharding import EPS, fill_item_table, shard

NUM_ITEMS, DIM, RATE = 50, 8, 0.1


@pytest.mark.parametrize("ids", [[], [7], [3, 49, 3, 0, 3]], ids=["none", "one", "repeated"])
def test_a_lookup_gives_the_rows_and_backward_updates_them(ids: list[int]) -> None:
    looked_up = torch.tensor(ids, dtype=torch.int64)
    with joined_ranks() as ranks:
        table = ItemTable(NUM_ITEMS, DIM)
        train = TrainConfig(learning_rate=RATE)
        model = shard(nn.Sequential(table), Placement("row_wise", "rowwise_adagrad"), train, ranks)
        fill_item_table(model, seed=1)
        before = table.rows(0, NUM_ITEMS).detach().clone()
        rows = table(lookup_ids(looked_up))
        upstream = torch.randn(len(ids), DIM)
        torch.testing.assert_close(rows, before[looked_up], rtol=0, atol=0)
        rows.backward(upstream)
        after = table.rows(0, NUM_ITEMS).detach()
    gradient = torch.zeros(NUM_ITEMS, DIM).index_add_(0, looked_up, upstream)
    sums = gradient.square().mean(1, keepdim=True)
    torch.testing.assert_close(after, before - RATE * gradient / (sums.sqrt() + EPS))


def test_lookups_on_cpu_are_bags_of_one_id() -> None:
    with joined_ranks() as ranks:
        table = ItemTable(NUM_ITEMS, DIM)
        shard(nn.Sequential(table), Placement("row_wise", "sgd"), TrainConfig(), ranks)
        assert isinstance(table.collection, ShardedEmbeddingCollection)
        kernels = [kernel for lookup in table.collection._lookups for kernel in lookup.modules()]
        assert [kernel.is_nobag for kernel in kernels if hasattr(kernel, "is_nobag")] == [False]
