"""What fine-tuning predicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from torchrec_pt.config.objectives import Negatives
from torchrec_pt.config.section import Section
from torchrec_pt.config.training import TrainConfig

InteractionName = Literal["inner", "outer", "hadamard", "concat", "fm", "cross", "dot"]


def _named_once(names: tuple[InteractionName, ...]) -> tuple[InteractionName, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each layer is named once; drop the repeated ones")
    return names


InteractionNames = Annotated[
    tuple[InteractionName, ...], Field(min_length=1), AfterValidator(_named_once)
]


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

    # The settings that make the task's head linear.
    linear_head: ClassVar[Mapping[str, Any]]

    label_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training labels that are used, drawn by seed"
    )
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
    """Which items a user takes next: softmax over the catalogue, or a loss over lists.

    A list is the next relevant items after a cut of the user's history, and negatives: items that
    the user never took in training, some of them shown to the user where the data says so.
    """

    linear_head: ClassVar[Mapping[str, Any]] = {"head": "linear"}

    loss: Literal["softmax", "bpr", "hinge", "listnet", "lambda", "approx_ndcg"] = Field(
        "softmax",
        description="pairwise: bpr, hinge; listwise: softmax (over the catalogue, or where "
        "negatives is given over sampled items), listnet, lambda, approx_ndcg",
    )
    temperature: float = Field(1.0, gt=0, description="scores are divided by it")
    margin: float = Field(1.0, gt=0, description="hinge: how far ahead is far enough")
    targets_per_user: int = Field(1, ge=1, description="history cuts of a user in one step")
    targets_per_cut: int = Field(1, ge=1, description="relevant items after a cut, in one list")
    newest: int | None = Field(
        None, ge=1, description="cut before one of a user's newest so many relevant items alone"
    )
    negatives: Negatives | None = Field(
        None,
        description="of a list; default: 16 of uniform distribution, and for softmax the catalogue",
    )
    impressions: bool | None = Field(
        None,
        description="items shown to the user after the cut and not taken (or rated below "
        "positive_rating) are up to half of a list's negatives; default: where there are labels",
    )
    positive_rating: float | None = Field(
        None, description="lowest rating of a relevant item; default: all that was taken is"
    )
    gain: Literal["binary", "rating"] = Field(
        "binary", description="how relevant an item is: 1, or its rating"
    )
    head: Literal["inner", "linear", "mlp"] = Field(
        "inner",
        description="inner: products of vectors; linear: of the item's and a map of the user's "
        "(a linear probe trains it); mlp: the product and an MLP over interactions and features",
    )
    interactions: InteractionNames = Field(("concat", "hadamard"), description="mlp: what it reads")
    hidden_dims: tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...] = Field(
        (128, 64), min_length=1, description="mlp"
    )
    dropout: float = Field(0.2, ge=0, le=0.99, description="mlp")

    @property
    def list_negatives(self) -> Negatives | None:
        """Negatives of a list; None where there are no lists but the catalogue."""
        if self.negatives is not None or self.loss == "softmax":
            return self.negatives
        return Negatives(num=16, distribution="uniform")

    @model_validator(mode="after")
    def _loss_and_head_read_their_settings(self) -> RankingConfig:
        if self.margin != 1 and self.loss != "hinge":
            raise ValueError(
                f'margin is that of hinge, and loss is "{self.loss}"; leave margin out, or set '
                'loss to "hinge"'
            )
        if self.list_negatives is None and self.head == "mlp":
            raise ValueError(
                "the mlp head scores pair by pair, and softmax is over the whole catalogue; add "
                'negatives, such as { num = 256 }, or set head to "linear" or "inner"'
            )
        if self.list_negatives is None and self.impressions:
            raise ValueError(
                "impressions are negatives of lists, and softmax over the catalogue has none; add "
                "negatives, such as { num = 256 }, or leave impressions out"
            )
        given = {"interactions", "hidden_dims", "dropout"} & self.model_fields_set
        defaults = type(self).model_fields
        changed = sorted(name for name in given if getattr(self, name) != defaults[name].default)
        if changed and self.head != "mlp":
            raise ValueError(
                f'{changed[0]} is of the mlp head, and head is "{self.head}"; leave it out, or '
                'set head to "mlp"'
            )
        return self


class PairConfig(TaskConfig):
    """A number for a user and an item: what ctr and rating share."""

    linear_head: ClassVar[Mapping[str, Any]] = {"hidden_dims": ()}

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
    interactions: InteractionNames = Field(
        ("concat", "hadamard"), description="what the MLP reads of user, item and features"
    )
    hidden_dims: tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...] = (128, 64)
    attention_heads: int = Field(
        1, ge=1, description="from the asked item to the user's history; divides model.dim"
    )
    dropout: float = Field(0.2, ge=0, le=0.99)
    factor_l2: float = Field(
        0.02, ge=0, description="of the squared factors of a pair's user and item, beside its loss"
    )
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
