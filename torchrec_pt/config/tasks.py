"""What fine-tuning predicts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from torchrec_pt.config.section import Section
from torchrec_pt.config.training import TrainConfig


class TaskConfig(TrainConfig):
    """What every fine-tuning task shares."""

    control: Literal["scratch"] | None = Field(
        None, description='"scratch": train the same model without the pretrained weights, too'
    )


class RankingConfig(TaskConfig):
    """Next-item ranking. `softmax` is listwise over the catalogue, `bpr` pairwise."""

    loss: Literal["softmax", "bpr"] = "softmax"
    temperature: float = Field(1.0, gt=0)
    targets_per_user: int = Field(1, ge=1, description="history cuts of a user in one step")
    num_negatives: int = Field(16, ge=1, description="bpr: sampled negatives of a target")


class PairConfig(TaskConfig):
    """A number for a user and an item: what ctr and rating share."""

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
    ctr: CtrConfig | None = None
    ranking: RankingConfig | None = None
    rating: RatingConfig | None = None

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """The configured tasks by name."""
        every = {"ctr": self.ctr, "ranking": self.ranking, "rating": self.rating}
        return {name: task for name, task in every.items() if task is not None}
