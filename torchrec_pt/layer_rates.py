"""How fast each layer of a pretrained model may change, and from when on.

Howard & Ruder 2018 (ULMFiT): discriminative fine-tuning (section 3.2), a rate for each group of
layers, and gradual unfreezing (section 3.3), from the top on, one group after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torchrec_pt.config import TransferConfig
from torchrec_pt.learner import Learner
from torchrec_pt.models.backbone import Backbone


class Part(NamedTuple):
    """What a person calls some parameters.

    Attributes:
        depth: 0 for the head of a task, 1 for the top group of the backbone, and so on down.
    """

    name: str
    depth: int


def part_of(backbone: Backbone, parameter: str) -> Part:
    """The part that a parameter of a learner belongs to, by its name in the state dict."""
    owner, *inner = parameter.split(".")
    if owner == "objectives":
        return Part(" ".join(inner[:2]).replace("_", " "), 0)
    groups = backbone.layers()
    for index, group in enumerate(groups):
        for name, modules in group.items():
            if any(f"{parameter}.".startswith(f"backbone.{module}.") for module in modules):
                return Part(name, len(groups) - index)
    return Part(inner[0], len(groups))  # of a backbone with other layers than this one


class LayerRate(NamedTuple):
    """How a parameter trains.

    Attributes:
        share: of the learning rate that it would have anyway.
        first_step: the step, from 0, that first trains it; None where none does.
    """

    share: float = 1.0
    first_step: int | None = 0

    def trains_at(self, step: int) -> bool:
        return self.first_step is not None and step >= self.first_step


def layer_rates(
    learner: Learner, parameters: Iterable[str], transfer: TransferConfig, steps_per_epoch: int
) -> dict[str, LayerRate]:
    """What `transfer` says of each parameter, by its name in the state dict.

    Where a task has no parameters of its own, unfreezing begins with the backbone's top group.
    """
    top = 0 if any(True for _ in learner.objectives.parameters()) else 1
    steps = steps_per_epoch * (transfer.unfreeze_every or 0)  # from one group to the next
    rates: dict[str, LayerRate] = {}
    for parameter in parameters:
        name, depth = part_of(learner.backbone, parameter)
        if not depth:
            rates[parameter] = LayerRate()
        elif transfer.frozen == "backbone" or (transfer.frozen and name == "item table"):
            rates[parameter] = LayerRate(0.0, None)
        else:
            share = transfer.backbone_rate * transfer.layer_decay ** (depth - 1)
            rates[parameter] = LayerRate(share, max(0, depth - top) * steps)
    return rates
