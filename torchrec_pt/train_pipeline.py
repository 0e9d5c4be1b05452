"""Steps of training through TorchRec's sparse-dist pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist

from torchrec_pt.data.batch import Batch, Rows
from torchrec_pt.learner import Learner
from torchrec_pt.optim import Optimizers


class TakenStep(NamedTuple):
    """A step whose update is applied.

    Attributes:
        num_rows: of this rank.
        means: (num_objectives,) as in `StepLoss`.
    """

    num_rows: int
    means: Tensor


# The loss to differentiate, and what to say of the step; sets the step's learning rate.
Forward = Callable[[Batch], tuple[Tensor, TakenStep]]


def suits_pipeline(learner: Learner, device: torch.device) -> bool:
    """Whether there is an exchange of ids to overlap, and a device that overlaps it."""
    return device.type == "cuda" and learner.backbone.items.is_sharded


class SparseDistPipeline:
    """While step i computes, the ids of step i + 1 travel and step i + 2 is drawn and copied.

    What runs ahead reads no parameter, and what depends on the step goes by `Batch.step`: the
    losses are those of a plain loop. The learner's table must be sharded.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        learner: Learner,
        optimizers: Optimizers,
        device: torch.device,
        forward: Forward,
    ) -> None:
        self._learner = learner
        self._device = device
        self._pipeline: TrainPipelineSparseDist[Batch, TakenStep] = TrainPipelineSparseDist(
            model,
            cast(torch.optim.Optimizer, optimizers),  # of which it calls zero_grad and step
            device,
            custom_model_fwd=cast(Callable[[Batch | None], tuple[Tensor, TakenStep]], forward),
        )

    def run(self, steps: Iterator[Rows]) -> Iterator[TakenStep]:
        """Take every step. In the end, or if it is closed, the model looks up by itself again."""
        batches = map(self._draw, steps)
        try:
            while True:
                try:
                    taken = self._pipeline.progress(batches)
                except StopIteration:
                    return
                yield taken
        finally:
            self._pipeline.detach()
            self._pipeline.reset()

    def _draw(self, rows: Rows) -> Batch:
        batch = self._learner.draw(rows)
        # Only from pinned memory does a copy run beside the computation.
        return batch.pin_memory() if self._device.type == "cuda" else batch
