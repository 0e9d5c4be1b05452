"""What fine-tuning predicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from torchrec_pt.config.section import Section
from torchrec_pt.config.training import TrainConfig


class TransferConfig(Section):
    """How far and how fast fine-tuning may change what was pretrained.

    Layers are told apart by groups, from the bottom (item table, item content, positions) to the
    top; the task's own head stands above them all (Howard & Ruder 2018, ULMFiT, section 3).
    """

    freeze: Literal["item_table", "backbone"] | None = Field(
        None, description="what keeps its pretrained values; backbone: the item table as well"
    )
    linear_probe: bool = Field(
        False, description="train a linear head alone, on a backbone that is frozen"
    )
    backbone_rate: float = Field(
        1.0, gt=0, description="learning rate of the backbone's top group, as a share of the head's"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each group has this share of the rate of the one above it"
    )
    unfreeze_every: int | None = Field(
        None, ge=1, description="epochs after which one more group trains; first the head alone"
    )

    @model_validator(mode="after")
    def _frozen_layers_have_no_rates(self) -> TransferConfig:
        if self.frozen != "backbone":
            return self
        what = "linear_probe" if self.linear_probe else 'freeze = "backbone"'
        idle = {"backbone_rate", "layer_decay", "unfreeze_every"} & self._changed
        if self.linear_probe:
            idle |= {"freeze"} & self._changed
        if idle:
            raise ValueError(f"{what} keeps all of the backbone as it is; drop {min(idle)}")
        return self

    @property
    def _changed(self) -> set[str]:
        fields = type(self).model_fields
        return {name for name, field in fields.items() if getattr(self, name) != field.default}

    @property
    def frozen(self) -> Literal["item_table", "backbone"] | None:
        """What never trains."""
        return "backbone" if self.linear_probe else self.freeze


class TaskConfig(TrainConfig):
    """What every fine-tuning task shares."""

    # The settings that make the task's head linear; none where it cannot be.
    linear_head: ClassVar[Mapping[str, Any]] = {}

    control: Literal["scratch"] | None = Field(
        None,
        description='"scratch": train the same model without the pretrained weights, too, all of '
        "it at one learning rate",
    )
    transfer: TransferConfig = TransferConfig()

    @model_validator(mode="before")
    @classmethod
    def _a_probe_makes_its_head_linear(cls, given: Any) -> Any:
        transfer = given.get("transfer") if isinstance(given, dict) else None
        if isinstance(transfer, TransferConfig):
            transfer = transfer.model_dump()
        is_probe = isinstance(transfer, dict) and transfer.get("linear_probe") is True
        return {**cls.linear_head, **given} if is_probe else given

    @model_validator(mode="after")
    def _a_probe_has_a_linear_head(self) -> TaskConfig:
        if not self.transfer.linear_probe:
            return self
        if not self.linear_head:
            raise ValueError("transfer.linear_probe: the task has no linear head; drop it")
        for name, value in self.linear_head.items():
            if getattr(self, name) != value:
                raise ValueError(f"transfer.linear_probe wants a linear head; drop {name}")
        return self

    @property
    def as_control(self) -> TaskConfig:
        """Of the scratch arm: a frozen backbone of random values would be no fair comparison."""
        return self.model_copy(update={"transfer": TransferConfig()})


def transfer_of(train: TrainConfig) -> TransferConfig:
    """What a stage says of its pretrained layers; a pretraining has none to say it of."""
    return train.transfer if isinstance(train, TaskConfig) else TransferConfig()


class RankingConfig(TaskConfig):
    """Next-item ranking. `softmax` is listwise over the catalogue, `bpr` pairwise."""

    loss: Literal["softmax", "bpr"] = "softmax"
    temperature: float = Field(1.0, gt=0)
    targets_per_user: int = Field(1, ge=1, description="history cuts of a user in one step")
    num_negatives: int = Field(16, ge=1, description="bpr: sampled negatives of a target")


class PairConfig(TaskConfig):
    """A number for a user and an item: what ctr and rating share."""

    linear_head: ClassVar[Mapping[str, Any]] = {"hidden_dims": ()}

    cuts_per_user: int = Field(1, ge=1, description="history cuts of a user in one step")
    targets_per_cut: int = Field(8, ge=1, description="items after a cut that are predicted")
    hidden_dims: tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...] = (128, 64)
    dropout: float = Field(0.2, ge=0, le=0.99)
    shrinkage: float = Field(
        10.0, ge=0, description="labels (for clicks, even ones) that pull a mean to 0"
    )


class CtrConfig(PairConfig):
    """Click-through rate: the label column, or ratings from `positive_rating` on, as clicks."""

    positive_rating: float | None = None


class RatingConfig(PairConfig):
    """The rating that a user gives an item, by least squares."""


class FinetuneConfig(Section):
    start_from: Path | None = Field(
        None,
        description="a stage's folder, or a checkpoint, of another run, whose model is fine-tuned "
        "in place of one that this run pretrains; its items and categories are matched by value",
    )
    ctr: CtrConfig | None = None
    ranking: RankingConfig | None = None
    rating: RatingConfig | None = None

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """The configured tasks by name."""
        every = {"ctr": self.ctr, "ranking": self.ranking, "rating": self.rating}
        return {name: task for name, task in every.items() if task is not None}
