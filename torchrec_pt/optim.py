"""Optimizers of a stage: AdamW for what DDP holds, fused ones for sharded tables, one schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_pt.config import TrainConfig
from torchrec_pt.sharding import Placement


class Optimizers:
    """The dense optimizer, the fused ones, and the learning rate that both follow."""

    def __init__(
        self,
        model: DistributedModelParallel,
        config: TrainConfig,
        placement: Placement,
        num_steps: int,
    ) -> None:
        if config.clip_norm is not None and placement.fused is not None:
            raise ValueError(
                "clip_norm: a sharded table is updated inside backward, before a global norm is "
                'known; drop clip_norm, or set model.item_table.placement to "replicated"'
            )
        self.config = config
        self.num_steps = num_steps
        self.fused = model.fused_optimizer
        parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
        self.parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        self.dense = KeyedOptimizerWrapper(
            self.parameters,
            lambda params: torch.optim.AdamW(
                _decay_groups(params, config.weight_decay), lr=config.learning_rate, fused=True
            ),
        )
        self._base_rates = [
            (group, group["lr"])
            for optimizer in (self.dense, self.fused)
            for group in optimizer.param_groups
        ]

    def step(self) -> None:
        """Clip and apply the dense gradients; fused tables were updated in backward."""
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        self.dense.step()

    def zero_grad(self) -> None:
        self.dense.zero_grad()

    def prepare(self, step: int) -> None:
        """Set step's learning rate and clear the gradients; call it before forward."""
        factor = schedule_factor(self.config, step, self.num_steps)
        for group, rate in self._base_rates:
            group["lr"] = rate * factor
        self.zero_grad()
        self.fused.step()  # hands the learning rate to the kernels; the rows are not touched

    def init_state(self) -> None:
        """Make the dense state exist, all zeros, before the first step.

        AdamW makes it lazily; a checkpoint of step 0 would hold none, and none could be loaded.
        """
        saved = [p.detach().clone() for p in self.parameters.values()]
        self.dense.init_state()  # a step with zero gradients, whose decay is taken back here
        self.dense.zero_grad()
        with torch.no_grad():
            for parameter, value in zip(self.parameters.values(), saved, strict=True):
                parameter.copy_(value)
                for state in self.dense.state[parameter].values():
                    state.zero_()

    def state(self) -> dict[str, Tensor]:
        """Tensors of both, named "<parameter>.<what>"; ShardedTensors where a table is sharded."""
        return {
            f"{name}.{what}": value
            for optimizer in (self.dense, self.fused)
            for name, values in optimizer.state_dict()["state"].items()
            for what, value in values.items()
        }


def schedule_factor(config: TrainConfig, step: int, num_steps: int) -> float:
    """Learning rate of `step` (from 0) over the base rate: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    if config.schedule == "linear":
        return max(0.0, 1 - done)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _decay_groups(params: list[Tensor], weight_decay: float) -> list[dict[str, object]]:
    """Biases, norms and single vectors are not decayed."""

    def is_matrix(p: Tensor) -> bool:
        return p.dim() > 1 and p.shape[1] > 1  # a table of width 1 holds biases

    return [
        {"params": [p for p in params if is_matrix(p)], "weight_decay": weight_decay},
        {"params": [p for p in params if not is_matrix(p)], "weight_decay": 0.0},
    ]
