"""What fine-tuning predicts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from torchrec_pt.config.objectives import Negatives
from torchrec_pt.config.section import Section
from torchrec_pt.config.training import TrainConfig

InteractionName = Literal["inner", "outer", "hadamard", "concat", "fm", "cross", "dot"]


class TaskConfig(TrainConfig):
    """What every fine-tuning task shares."""

    label_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training labels that are used, drawn by seed"
    )
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

    context: Literal["before", "others"] = Field(
        "before",
        description="labels of the user that a prediction reads: of the rows before the asked one, "
        "or of all others; for splits that do not go by time, where held-out rows lie among them",
    )
    context_length: int | None = Field(
        None, ge=1, description="newest of them that are read; default: as the model's history"
    )
    cuts_per_user: int = Field(1, ge=1, description="history cuts of a user in one step")
    targets_per_cut: int = Field(
        8,
        ge=1,
        description="rows of a cut that are predicted: after it, or drawn where others are read",
    )
    interactions: tuple[InteractionName, ...] = Field(
        ("concat", "hadamard"), description="what the MLP reads of user, item and features"
    )
    hidden_dims: tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...] = (128, 64)
    attention_heads: int = Field(1, ge=1, description="from the asked item to the user's labels")
    dropout: float = Field(0.2, ge=0, le=0.99)
    shrinkage: float = Field(
        10.0, ge=0, description="labels (for clicks, even ones) that pull a mean to 0"
    )


class CtrConfig(PairConfig):
    """Click-through rate: the label column, or ratings from `positive_rating` on, as clicks.

    Where there is neither, every interaction is a click, and each has sampled ones beside it.
    """

    positive_rating: float | None = None
    negatives: Negatives | None = Field(
        None, description="sampled for each click, of items that the user never took in training"
    )
    loss: Literal["bce", "weighted", "focal"] = "bce"
    positive_weight: float | None = Field(
        None, gt=0, description="weighted: of a click; default: as much as makes the classes equal"
    )
    focal_gamma: float = Field(2.0, ge=0, description="focal: how little easy rows count")
    focal_alpha: float = Field(0.5, gt=0, lt=1, description="focal: the weight of a click")


class RatingConfig(PairConfig):
    """The rating that a user gives an item."""

    loss: Literal["mse", "rmse", "huber"] = "mse"
    huber_delta: float = Field(1.0, gt=0, description="huber: errors beyond it count linearly")


class FinetuneConfig(Section):
    ctr: CtrConfig | None = None
    ranking: RankingConfig | None = None
    rating: RatingConfig | None = None

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """The configured tasks by name."""
        every = {"ctr": self.ctr, "ranking": self.ranking, "rating": self.rating}
        return {name: task for name, task in every.items() if task is not None}
