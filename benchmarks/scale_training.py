"""What bench_scale.py trains: next-item prediction over a row-wise sharded item table.

A causal transformer of one block, sampled softmax over uniform negatives (other distributions have
tables of their own, 24 bytes an item), row-wise Adagrad fused for the table, AdamW for the
rest. Items are uniform too: popular ones would stay in the caches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchrec_pt import rng
from torchrec_pt.config import (
    NextItem,
    PredictionNegatives,
    TableConfig,
    TrainConfig,
    TransformerConfig,
)
from torchrec_pt.data.batch import Batch, Rows
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks
from torchrec_pt.learner import Learner
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.item_softmax import SampledSoftmax
from torchrec_pt.objectives.next_item import NextItemObjective
from torchrec_pt.optim import Optimizers
from torchrec_pt.placement import settle_placement
from torchrec_pt.sharding import fill_item_table, shard

DIM = 32
SEED = 1


@dataclass(frozen=True)
class Load:
    """What a step reads: users of the global batch, items of each, negatives.

    Attributes:
        shared: whether `num_negatives` are drawn for all predictions, or for each.
    """

    batch_size: int
    length: int
    num_negatives: int
    shared: bool

    @property
    def num_lookups(self) -> int:
        """Ids that a step names: the items of the histories and the negatives."""
        num_predictions = self.batch_size * self.length
        negatives = self.num_negatives * (1 if self.shared else num_predictions)
        return num_predictions + self.batch_size + negatives


# By what a step mostly does. In "lookups" each prediction has negatives of its own.
LOADS = {
    "lookups": Load(batch_size=128, length=20, num_negatives=16, shared=False),
    "arithmetic": Load(batch_size=256, length=50, num_negatives=1024, shared=True),
}


def small(load: Load) -> Load:
    """To try the code."""
    return replace(load, batch_size=16, num_negatives=min(load.num_negatives, 64))


class Training:
    """The library's own pieces, put together as a training stage does."""

    def __init__(self, num_items: int, load: Load, ranks: Ranks) -> None:
        self.num_items = num_items
        self.load = load
        self.ranks = ranks
        table = TableConfig(placement="row_wise", optimizer="rowwise_adagrad")
        model = TransformerConfig(
            dim=DIM,
            max_length=load.length,
            num_layers=1,
            dropout=0.0,
            attention="causal",
            item_table=table,
        )
        negatives = PredictionNegatives(
            num=load.num_negatives, distribution="uniform", shared=load.shared
        )
        counts = torch.ones((), dtype=torch.int64).expand(num_items)  # of all items, in 8 bytes
        softmax = SampledSoftmax(
            negatives, counts, seed=SEED, name="next_item", max_length=load.length
        )
        objective = NextItemObjective(NextItem(name="next_item"), model, softmax)
        placement = settle_placement(table, num_items, DIM, ranks.device.type)
        train = TrainConfig(warmup_steps=0, schedule="constant")
        torch.manual_seed(SEED)
        self.learner = Learner(Transformer(model, num_items), [objective], placement, ranks)
        start = time.monotonic()
        self.model = shard(self.learner, placement, train, ranks)
        self.shard_s = time.monotonic() - start
        start = time.monotonic()
        fill_item_table(self.model, SEED)
        self.fill_s = time.monotonic() - start
        self.optimizers = Optimizers(self.model, train, placement, num_steps=1)
        self.model.train()

    @property
    def table_bytes(self) -> int:
        return self.num_items * DIM * 4

    @property
    def state_bytes(self) -> int:
        """Of row-wise Adagrad: a float32 a row."""
        return self.num_items * 4

    def rows(self, step: int) -> Rows:
        """This rank's rows, dealt as the loader deals them."""
        size, length = self.load.batch_size, self.load.length + 1
        generator = torch.Generator().manual_seed(step)
        items = torch.randint(self.num_items, (size, length), generator=generator)
        mine = torch.arange(self.ranks.rank, size, self.ranks.world_size)
        return Rows(
            users=mine,
            noise=rng.RowNoise(SEED, step, mine),
            weight=torch.ones(len(mine)),
            histories=Jagged(items[mine].flatten(), torch.arange(len(mine) + 1) * length),
        )

    def draw(self, rows: Rows) -> Batch:
        return self.learner.draw(rows)

    def step(self, rows: Rows) -> None:
        """As `Trainer.step`."""
        self.optimizers.prepare(rows.noise.step)
        out = self.model(self.draw(rows))
        assert bool(torch.isfinite(out.means).all())
        out.loss.backward()
        self.optimizers.step()


class BareTable:
    """A tensor of the table's size, of which rows are read and updated and nothing else is done."""

    def __init__(self, num_items: int) -> None:
        self.rows = torch.ones(num_items, DIM)
        self.sums = torch.ones(num_items)

    def gather_and_scatter(self, ids: Tensor) -> None:
        """As row-wise Adagrad, with the rows themselves as their gradients."""
        gradient = self.rows.index_select(0, ids)
        sums = self.sums.index_select(0, ids) + gradient.square().mean(1)
        self.sums.index_copy_(0, ids, sums)
        self.rows.index_add_(0, ids, gradient / sums.sqrt().unsqueeze(1), alpha=-1e-3)
