"""Optimizers of a stage: AdamW, the item table's own, dense or fused, and one schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_pt.config import TrainConfig
from torchrec_pt.layer_rates import LayerRate
from torchrec_pt.models.item_table import ItemTable
from torchrec_pt.placement import Placement
from torchrec_pt.sharding import EPS, is_item_table


class Optimizers:
    """AdamW for what DDP holds, the item table's own optimizer, and the schedule that all follow.

    Where the table has an optimizer of its own it takes the same steps in every placement, fused
    or dense, with the same `eps`, the same state and no weight decay. Clipping is by the norm of
    all gradients, a replicated table's among them. The state exists, all zeros, from the start.

    Args:
        layers: by name of the parameter, where not all train at one rate from the first step on.

    Attributes:
        layers: of every parameter.
        rates: learning rate of every parameter before the schedule; of one that is frozen, 0.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        config: TrainConfig,
        placement: Placement,
        num_steps: int,
        layers: Mapping[str, LayerRate] | None = None,
    ) -> None:
        if placement.fused is not None:
            _refuse_what_fused_tables_lack(config)
        self.config = config
        self.num_steps = num_steps
        self.fused = model.fused_optimizer
        parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
        self.parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        table = {n: p for n, p in self.parameters.items() if is_item_table(n)}
        table_rate = placement.learning_rate or config.learning_rate
        self.layers = {n: LayerRate() for n, _ in model.named_parameters()} | dict(layers or {})
        self.rates = {
            name: layer.share * (table_rate if is_item_table(name) else config.learning_rate)
            for name, layer in self.layers.items()
        }
        self._step = 0
        self._items = next(m for m in model.modules() if isinstance(m, ItemTable))
        has_own = placement.optimizer != "adamw"
        others = {n: p for n, p in self.parameters.items() if not (has_own and n in table)}
        groups = _adamw_groups(others, config.weight_decay, self.rates)
        self.adamw = KeyedOptimizerWrapper(
            others, lambda _: torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        )
        self.dense = [self.adamw]
        if has_own and table:
            (rate,) = {self.rates[name] for name in table}
            self.dense.append(_dense_table_optimizer(table, placement.optimizer, rate))
        self._base_rates = [(g, g["lr"]) for o in self.dense for g in o.param_groups]
        share = self._layer_of_table.share
        self._base_rates += [(g, g["lr"] * share) for g in self.fused.param_groups]
        self._init_state()

    def step(self) -> None:
        """Clip and apply the dense gradients; fused tables were updated in backward."""
        for name, parameter in self.parameters.items():
            if not self.layers[name].trains_at(self._step):
                parameter.grad = None  # which leaves the parameter and its states as they are
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        for optimizer in self.dense:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.dense:
            optimizer.zero_grad()

    def prepare(self, step: int) -> None:
        """Set step's learning rates and clear the gradients; call it before forward."""
        self._step = step
        if self._items.is_sharded:
            self._items.is_frozen = not self._layer_of_table.trains_at(step)
        factor = schedule_factor(self.config, step, self.num_steps)
        for group, rate in self._base_rates:
            group["lr"] = rate * factor
        self.zero_grad()
        self.fused.step()  # hands the learning rate to the kernels; the rows are not touched

    @property
    def _layer_of_table(self) -> LayerRate:
        return next(layer for name, layer in self.layers.items() if is_item_table(name))

    def _init_state(self) -> None:
        """AdamW makes its state lazily; a checkpoint of step 0 would hold none."""
        for group, _ in self._base_rates:
            group["lr"] = 0.0
        for optimizer in self.dense:
            optimizer.init_state()  # a step with zero gradients, at a rate that moves nothing
            optimizer.zero_grad()
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        for group, rate in self._base_rates:
            group["lr"] = rate

    def state(self) -> dict[str, Tensor]:
        """The live tensors, named "<parameter>.<what>"; ShardedTensors where a table is sharded.

        A table's own optimizer has one `sum` (of squared gradients) or nothing, under the same
        name and of the same shape in every placement: (num_items, dim) or, row-wise, (num_items,).
        """
        found: dict[str, Tensor] = {}
        for optimizer in (*self.dense, self.fused):
            for name, values in optimizer.state_dict()["state"].items():
                is_own = is_item_table(name) and optimizer is not self.adamw
                saved = _own_state(values) if is_own else values
                found |= {f"{name}.{what}": value for what, value in saved.items()}
        return found


def _refuse_what_fused_tables_lack(config: TrainConfig) -> None:
    reasons = {
        "clip_norm": "is updated inside backward, before a global norm is known",
        "accumulate_steps": "is updated inside backward, batch by batch",
        "average_decay": "is updated inside backward, row by row, and has no average",
    }
    for name, reason in reasons.items():
        if getattr(config, name) != TrainConfig.model_fields[name].default:
            raise ValueError(
                f"{name}: a sharded table {reason}; drop {name}, or set "
                'model.item_table.placement to "replicated"'
            )


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


def _dense_table_optimizer(
    table: dict[str, Tensor], optimizer: str, learning_rate: float
) -> KeyedOptimizerWrapper:
    """What FBGEMM fuses into the backward of a sharded table, for one that is replicated."""
    if optimizer == "sgd":
        return KeyedOptimizerWrapper(
            table, lambda params: torch.optim.SGD(params, lr=learning_rate, fused=True)
        )
    if optimizer == "adagrad":
        return KeyedOptimizerWrapper(
            table,
            lambda params: torch.optim.Adagrad(params, lr=learning_rate, eps=EPS, fused=True),
        )
    return KeyedOptimizerWrapper(
        table, lambda params: RowWiseAdagrad(params, lr=learning_rate, eps=EPS)
    )


def _own_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of squared gradients from the dense or fused state of a table's own optimizer.

    Dense: `sum`, row-wise (num_items, 1), and a `step` that only a decaying rate would read.
    Fused: "<table>.momentum1".
    """
    own: dict[str, Tensor] = {}
    for what, value in state.items():
        if what == "sum" or what.endswith(".momentum1"):
            is_column = value.dim() == 2 and value.size(1) == 1
            own["sum"] = value.view(-1) if is_column else value
    return own


def _adamw_groups(
    parameters: dict[str, Tensor], weight_decay: float, rates: Mapping[str, float]
) -> list[dict[str, object]]:
    """Biases, norms and single vectors are not decayed; every rate makes a group of its own."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in parameters.items():
        is_matrix = p.dim() > 1 and p.shape[1] > 1  # a table of width 1 holds biases
        is_decayed = is_matrix or is_item_table(name)
        groups.setdefault((weight_decay if is_decayed else 0.0, rates[name]), []).append(p)
    return [
        {"params": group, "weight_decay": decay, "lr": rate}
        for (decay, rate), group in groups.items()
    ]
