"""How a stage trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from torchrec_pt.config.objectives import Objective
from torchrec_pt.config.section import Section


class TrainConfig(Section):
    """What every training stage shares. `batch_size` counts rows over all ranks together."""

    epochs: int = Field(20, ge=0)
    batch_size: int = Field(128, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    clip_norm: float | None = Field(None, gt=0)
    average_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="validate, keep and serve an exponential average of the weights, with this "
        "decay a step (0.999 or so), while the weights themselves train on",
    )
    validate_every: int = Field(1, ge=1, description="epochs between two validations")
    patience: int | None = Field(None, ge=1, description="validations without gain before the end")
    keep_checkpoints: int = Field(2, ge=1)
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between two checkpoints; default: only at validations"
    )
    async_checkpoints: bool = Field(
        True,
        description="train on while a checkpoint is written; "
        "false: no second copy of the tables in memory",
    )


class PretrainConfig(TrainConfig):
    objectives: tuple[Objective, ...] = Field(min_length=1)
    continue_from: Path | None = Field(
        None,
        description="a stage's folder, or a checkpoint, of another run: start with its model and "
        "optimizer states, its items matched by external id",
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> PretrainConfig:
        names = [objective.name for objective in self.objectives]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'objective "{name}" is given twice; merge the two')
        return self
