"""A training batch, and the plan of lookups it is drawn from.

One lookup a step: every item id that the objectives of a step need (histories,
views, targets, negatives, this rank's slice of the catalogue) stands in ONE
KeyedJaggedTensor, one key a table, so that a table whose optimizer is fused
into backward is updated exactly once. Each distinct id is looked up once; the
named segments below say whose ids are whose, and where each is among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.rng import RowNoise

ITEM = "item"


@dataclass(frozen=True)
class RowKeys:
    """Which rows of a step one rank holds.

    Attributes:
        users: (B,) int64, places among the rank's users; −1 marks a padding row.
        noise: the randomness of these rows in this step.
        weight: (B,) float32; 0 for a padding row.
    """

    users: Tensor
    noise: RowNoise
    weight: Tensor

    def copies(self, num: int) -> RowKeys:
        """`num` copies of the rows, each with noise of its own: all rows, then all again, …"""
        return RowKeys(self.users.repeat(num), self.noise.copies(num), self.weight.repeat(num))


@dataclass(frozen=True)
class Rows(RowKeys):
    """What one rank starts a step from: some users and their training histories.

    Attributes:
        histories: B jagged rows of item ids in time order; empty for a padding row.
    """

    histories: Jagged

    @property
    def num_rows(self) -> int:
        return self.histories.num_rows


def rows_of_users(per_user: Jagged, users: Tensor) -> Jagged:
    """The rows of these users (B,) int64 in a jagged of all users; user −1 has an empty one."""
    starts = per_user.offsets[users.clamp(min=0)]
    return per_user.slices(starts, per_user.offsets[users + 1] - starts)


@dataclass(frozen=True)
class Draw:
    """What one objective makes of the rows: ids to look up, and labels or masks beside them."""

    lookups: Mapping[str, Jagged] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Embedded:
    """A draw after the lookup.

    Attributes:
        ids: as drawn.
        rows: (U, D) the table rows of distinct items.
        places: of each of `ids`, which of the rows is its item's.
    """

    ids: Mapping[str, Jagged]
    rows: Tensor
    places: Mapping[str, Jagged]
    tensors: Mapping[str, Tensor]

    @cached_property
    def vectors(self) -> Mapping[str, Jagged]:
        """The (T, D) rows of each of `ids`.

        The gradients of an item's entries add up in their order: the same bits each time.
        """
        return {
            name: at.with_values(F.embedding(at.values, self.rows))
            for name, at in self.places.items()
        }


@dataclass
class Batch(Pipelineable):
    """One rank's part of a step.

    Attributes:
        ids: the distinct item ids of all segments, ascending, then this rank's range of the
            catalogue; under the key "item", stride 1.
        num_distinct: how many of `ids` come before the catalogue's.
        places: (T,) int64, for each entry of the segments its place among the distinct ids.
        offsets: segment name -> (R + 1,) int64 row offsets; segments lie in `places` in this order.
        tensors: labels and masks, named like the segments: "<objective>.<name>".
        times: segment name -> (its entries,) float64 as in `Jagged`, of segments that have them;
            empty for a backbone that reads none.
        rows: (B,) numbers of the rows in the global batch.
        users, weight: (B,) as in `RowKeys`.
    """

    seed: int
    step: int
    rows: Tensor
    users: Tensor
    weight: Tensor
    ids: KeyedJaggedTensor
    num_distinct: int
    places: Tensor
    offsets: dict[str, Tensor]
    tensors: dict[str, Tensor]
    times: dict[str, Tensor] = field(default_factory=dict)

    @property
    def keys(self) -> RowKeys:
        return RowKeys(self.users, RowNoise(self.seed, self.step, self.rows), self.weight)

    def split(self, looked_up: Tensor) -> tuple[Tensor, Tensor]:
        """Of the vectors of `ids` those of the distinct ids, and the catalogue's."""
        rows, catalogue = looked_up.tensor_split([self.num_distinct])
        return rows, catalogue

    def embedded(self, rows: Tensor, owner: str) -> Embedded:
        """The segments and tensors of `owner`, with the rows (num_distinct, D) of the items."""
        sizes = [int(offsets[-1]) for offsets in self.offsets.values()]
        parts = zip(self.offsets.items(), self.places.split(sizes), strict=True)
        prefix = owner + "."
        places = {
            name.removeprefix(prefix): Jagged(part, offsets, self.times.get(name))
            for (name, offsets), part in parts
            if name.startswith(prefix)
        }
        ids = self.ids.values()
        return Embedded(
            ids={name: at.with_values(ids[at.values]) for name, at in places.items()},
            rows=rows,
            places=places,
            tensors={
                name.removeprefix(prefix): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(prefix)
            },
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._map(lambda value: value.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        self._map(lambda value: value.record_stream(stream) or value)

    def _map(self, function: Any) -> Batch:
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, dict):
                changed[item.name] = {name: function(tensor) for name, tensor in value.items()}
            elif not isinstance(value, int):
                changed[item.name] = function(value)
        return replace(self, **changed)


def assemble(
    rows: Rows,
    draws: Mapping[str, Draw],
    catalogue: tuple[int, int] | None,
    *,
    with_times: bool = False,
) -> Batch:
    """Join the draws of all objectives (by name) into one batch with one lookup.

    Args:
        catalogue: [begin, end) of the item rows to look up as keys, or None for none.
        with_times: whether the segments' times travel too.
    """
    segments: dict[str, Jagged] = {}
    tensors: dict[str, Tensor] = {}
    for owner, draw in draws.items():
        segments |= {f"{owner}.{name}": ids for name, ids in draw.lookups.items()}
        tensors |= {f"{owner}.{name}": tensor for name, tensor in draw.tensors.items()}
    empty = rows.histories.values.new_zeros(0)
    entries = torch.cat([empty, *(segment.values for segment in segments.values())])
    distinct, places = entries.unique(return_inverse=True)
    keys = empty if catalogue is None else torch.arange(*catalogue)
    times = {name: ids.times for name, ids in segments.items() if ids.times is not None}
    return Batch(
        seed=rows.noise.seed,
        step=rows.noise.step,
        rows=rows.noise.rows,
        users=rows.users,
        weight=rows.weight,
        ids=lookup_ids(torch.cat([distinct, keys])),
        num_distinct=len(distinct),
        places=places,
        offsets={name: segment.offsets for name, segment in segments.items()},
        tensors=tensors,
        times=times if with_times else {},
    )


def lookup_ids(ids: Tensor) -> KeyedJaggedTensor:
    """(T,) item ids as the one-row KeyedJaggedTensor that the item table reads."""
    lengths = torch.tensor([len(ids)], dtype=torch.int64, device=ids.device)
    return KeyedJaggedTensor(keys=[ITEM], values=ids, lengths=lengths)
