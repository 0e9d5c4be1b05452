"""The face that every pretraining objective and fine-tuning task shows to the learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from torchrec_pt.config import ModelConfig, TransformerConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue


@dataclass(frozen=True)
class LossTerm:
    """One objective's share of a step on this rank.

    Attributes:
        total: 0-dim, Σ weight · loss over this rank's rows; its gradient is that of the sum
            over all ranks.
        weight: 0-dim, Σ weight over this rank's rows.
    """

    total: Tensor
    weight: Tensor


class Objective(Protocol):
    """`draw` turns rows into lookups and labels, without parameters; `loss` is the rest.

    Attributes:
        name: as in the configuration.
        scale: its weight in the sum of objectives.
        needs_catalogue: whether `loss` reads the catalogue.
    """

    name: str
    scale: float
    needs_catalogue: bool

    def draw(self, rows: Rows) -> Draw: ...

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm: ...


def with_attention(
    name: str, model: ModelConfig, attention: str, *, reason: str, instead: str
) -> TransformerConfig:
    """The model's configuration, once it is sure of a vector at every position by this attention.

    Args:
        name: the objective that needs it.
        reason: why not by another attention; `instead`: the objective for that one.
    Raises:
        ValueError: the backbone has no such vectors, or by another attention.
    """
    if model.backbone != "transformer":
        raise ValueError(
            f"pretrain.objectives: {name} needs a vector at every position, which "
            f'{model.backbone} has not; use contrastive, or set model.backbone to "transformer"'
        )
    if model.attention != attention:
        raise ValueError(
            f'pretrain.objectives: {name} {reason}; model.attention is "{model.attention}"; '
            f'set it to "{attention}", or use {instead}'
        )
    return model
