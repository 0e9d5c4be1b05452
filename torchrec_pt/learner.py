"""A backbone with the objectives (or the task) that train it: one forward is one step's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from torchrec_pt.data.batch import ITEM, Batch, Rows, assemble
from torchrec_pt.distributed import Ranks, sum_over_ranks
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.objectives.loss_term import LossTerm, Objective
from torchrec_pt.placement import Placement
from torchrec_pt.rng import RowNoise


class StepLoss(NamedTuple):
    """A tuple, since DDP overlooks the tensors of a dataclass and would not reduce gradients.

    Attributes:
        loss: 0-dim, to differentiate: scaled so that averaging over ranks gives the global mean.
        means: (num_objectives,) global means, detached, in the order of the objectives.
    """

    loss: Tensor
    means: Tensor


class _Untraced(nn.Module):
    """A method as one node: `TrainPipelineSparseDist` traces calls, but not into such a module.

    Held weakly: none of the method's modules is registered twice, and no circle is closed.
    """

    def __init__(self, method: Callable[[Batch, Tensor], StepLoss]) -> None:
        super().__init__()
        self._method = WeakMethod(method)

    def forward(self, batch: Batch, looked_up: Tensor) -> StepLoss:
        method = self._method()
        assert method is not None
        return method(batch, looked_up)


class Learner(nn.Module):
    _scales: Tensor

    def __init__(
        self,
        backbone: Backbone,
        objectives: Sequence[nn.Module],
        placement: Placement,
        ranks: Ranks,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.objectives = nn.ModuleDict({str(o.name): o for o in objectives})
        self.ranks = ranks
        scales = torch.tensor([float(o.scale) for o in self._objectives()])
        self.register_buffer("_scales", scales, persistent=False)  # on the device from the start
        self._needs_catalogue = any(o.needs_catalogue for o in self._objectives())
        self._is_sharded = placement.fused is not None
        self._looks_up_catalogue = self._needs_catalogue and self._is_sharded
        self._catalogue_range = ranks.part_of(backbone.items.num_items)
        self._untraced_loss = _Untraced(self._loss)

    def freeze(self, what: Literal["item_table", "backbone"]) -> None:
        """From now on it has no gradients; before the learner is sharded, so that DDP knows.

        Raises:
            ValueError: nothing is left to train.
        """
        backbone = self.backbone
        if what == "backbone" and not any(True for _ in self.objectives.parameters()):
            task = next(iter(self.names))
            raise ValueError(
                f"finetune.{task}.transfer: freezes the backbone, and the task has nothing else "
                'to train; set freeze to "item_table", or leave it out'
            )
        frozen = backbone.items if what == "item_table" else backbone
        for name, parameter in frozen.named_parameters():
            # Of a sharded table TorchRec wants a parameter that trains.
            if not (self._is_sharded and name.endswith(f"embeddings.{ITEM}.weight")):
                parameter.requires_grad_(False)
        backbone.items.is_frozen = True
        backbone.is_frozen = what == "backbone"
        self.train(self.training)

    def train(self, mode: bool = True) -> Learner:
        """A frozen backbone stays in evaluation mode: without dropout, in float32."""
        super().train(mode)
        if self.backbone.is_frozen:
            self.backbone.eval()
        return self

    @property
    def names(self) -> list[str]:
        return list(self.objectives)

    def _objectives(self) -> list[Objective]:
        return list(self.objectives.values())  # type: ignore[arg-type]

    def draw(self, rows: Rows) -> Batch:
        """This rank's batch of a step; reads no parameter, so it may run ahead of training."""
        draws = {objective.name: objective.draw(rows) for objective in self._objectives()}
        catalogue = self._catalogue_range if self._looks_up_catalogue else None
        return assemble(rows, draws, catalogue, with_times=self.backbone.reads_times)

    def forward(self, batch: Batch) -> StepLoss:
        loss: StepLoss = self._untraced_loss(batch, self.backbone.items(batch.ids))
        return loss

    def _loss(self, batch: Batch, looked_up: Tensor) -> StepLoss:
        ids = batch.ids.values()
        noise = RowNoise(batch.seed, batch.step, ids)
        if self.backbone.items.is_frozen:
            looked_up = looked_up.detach()
        rows, catalogue_rows = batch.split(self.backbone.represent(ids, looked_up, noise))
        catalogue = self._catalogue(catalogue_rows, batch) if self._needs_catalogue else None
        terms: list[LossTerm] = []
        for objective in self._objectives():
            drawn = batch.embedded(rows, objective.name)
            terms.append(objective.loss(self.backbone, drawn, batch.keys, catalogue))
        totals = torch.stack([term.total for term in terms])
        weights = torch.stack([term.weight for term in terms])
        sums = sum_over_ranks(torch.stack([totals, weights]))
        global_weights = sums[1].clamp(min=torch.finfo(torch.float32).tiny)
        scales = self._scales * self.ranks.world_size / global_weights
        return StepLoss(loss=(totals * scales).sum(), means=sums[0] / global_weights)

    def _catalogue(self, rows: Tensor, batch: Batch) -> Catalogue:
        """`rows`: of this rank's range, represented; of a whole table they are read here."""
        first = self._catalogue_range[0] if self._looks_up_catalogue else 0
        num_rows = len(rows) if self._looks_up_catalogue else self.backbone.items.num_items
        ids = torch.arange(first, first + num_rows, device=rows.device)
        if not self._looks_up_catalogue:
            noise = RowNoise(batch.seed, batch.step, ids)
            rows = self.backbone.represent(ids, self.backbone.items.weight, noise)
        keys = self.backbone.encode_items(ids, rows)
        return Catalogue(keys, first, self._looks_up_catalogue)
