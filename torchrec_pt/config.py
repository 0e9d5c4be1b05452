"""Every configuration type of a run.

A run is one TOML file. Each section below is a frozen pydantic model that
forbids unknown keys, so a misspelt key is an error that names its neighbour.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self, exclude: frozenset[str] = frozenset()) -> str:
        """Stable hash of this section's resolved values; names stages that may be reused."""
        text = json.dumps(self.model_dump(mode="json", exclude=set(exclude)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- data ---------------------------------------------------------------------------------------


class Columns(Section):
    """The names that the raw files give to the columns we need."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = None
    rating: str | None = None
    label: str | None = None
    split: str | None = None


class Feature(Section):
    """A raw column that describes a user, an item or an interaction."""

    column: str
    of: Literal["user", "item", "interaction"]
    kind: Literal["categorical", "numeric", "text", "vector"]
    separator: str | None = Field(
        None, description="splits one cell into several categories or vector elements"
    )
    pooling: Literal["mean", "sum"] = Field(
        "mean", description="categorical: how the vectors of a cell's categories become one"
    )


class Filters(Section):
    """Rows are dropped in this order: rating, duplicates, then k-core until nothing changes."""

    min_rating: float | None = None
    duplicates: Literal["keep", "first", "last"] = "keep"
    user_core: int = Field(1, ge=1, description="fewest interactions of a kept user")
    item_core: int = Field(1, ge=1, description="fewest interactions of a kept item")


class LeaveOneOutSplit(Section):
    """The last interaction of a user is test, the one before it valid.

    Users with fewer than three interactions are all training.
    """

    rule: Literal["leave_one_out"] = "leave_one_out"


class TemporalSplit(Section):
    """Unix times: before `valid_from` is train, before `test_from` valid, the rest test."""

    rule: Literal["temporal"]
    valid_from: float
    test_from: float

    @model_validator(mode="after")
    def _ordered(self) -> TemporalSplit:
        if not self.valid_from < self.test_from:
            raise ValueError("valid_from must be smaller than test_from")
        return self


class RatioSplit(Section):
    """Random (by seed) over all rows, or the last part of each user's rows in time order."""

    rule: Literal["ratio"]
    valid: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)
    over: Literal["all", "user"] = "all"

    @model_validator(mode="after")
    def _leaves_training(self) -> RatioSplit:
        if self.valid + self.test >= 1:
            raise ValueError("valid + test must be below 1, else nothing is left to train on")
        return self


class GivenSplit(Section):
    """A column (`data.columns.split`) whose cells are "train", "valid" or "test"."""

    rule: Literal["given"]


Split = Annotated[
    LeaveOneOutSplit | TemporalSplit | RatioSplit | GivenSplit, Field(discriminator="rule")
]


class DataConfig(Section):
    format: Literal["csv", "tsv", "parquet", "movielens", "recbole", "sequence"]
    path: Path = Field(description="a file, a folder, or a glob of files of one format")
    prepared: Path | None = Field(None, description="default: <run_dir>/prepared")
    columns: Columns = Columns()
    features: tuple[Feature, ...] = ()
    filters: Filters = Filters()
    split: Split = LeaveOneOutSplit()


# --- model --------------------------------------------------------------------------------------


class TableConfig(Section):
    """Where the rows of the item table live and what updates them.

    `replicated` keeps the whole table on every rank under DDP; the other
    placements shard it through TorchRec, with an optimizer fused into backward.
    `planner` leaves it to TorchRec's planner how. `adamw` needs a replicated
    table; the other optimizers train alike in every placement.
    """

    placement: Literal[
        "auto",
        "planner",
        "replicated",
        "table_wise",
        "row_wise",
        "column_wise",
        "table_row_wise",
        "grid",
    ] = "auto"
    optimizer: Literal["auto", "adamw", "sgd", "adagrad", "rowwise_adagrad"] = "auto"
    learning_rate: float | None = Field(None, gt=0, description="default: that of the stage")
    replicated_max_mb: float = Field(256, gt=0, description="`auto` replicates below this")


class BackboneConfig(Section):
    """What every backbone shares."""

    dim: int = Field(64, ge=8, multiple_of=8)
    max_length: int = Field(50, ge=2, description="newest items of a history that are read")
    dropout: float = Field(0.2, ge=0, le=0.99)
    similarity: Literal["inner", "cosine"] = Field(
        "inner", description="of user and item vectors; cosine wants objectives with a temperature"
    )
    item_content: bool = Field(
        True, description="the item features of the data are part of an item's vector"
    )
    row_dropout: float = Field(
        0.0, ge=0, lt=1, description="items a step known by their features alone"
    )
    item_table: TableConfig = TableConfig()


class TransformerConfig(BackboneConfig):
    """Self-attention over the history: causal as SASRec, bidirectional as BERT4Rec."""

    backbone: Literal["transformer"] = "transformer"
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(2, ge=1)
    ffn_dim: int | None = Field(None, ge=1, description="default: 4 × dim")
    attention: Literal["causal", "bidirectional"] = "bidirectional"

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of num_heads ({self.num_heads})")
        return self

    @property
    def history_length(self) -> int:
        """Items of a history that a user's vector reads; a bidirectional model appends [MASK]."""
        return self.max_length if self.attention == "causal" else self.max_length - 1


class TwoTowerConfig(BackboneConfig):
    """A tower for users (pooled history, features) and one for items (row, features)."""

    backbone: Literal["two_tower"]
    hidden_dims: tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...] = (128,)

    @property
    def history_length(self) -> int:
        return self.max_length


ModelConfig = TransformerConfig | TwoTowerConfig


# --- objectives and tasks -----------------------------------------------------------------------


class Negatives(Section):
    """Items drawn as negatives, corrected by how often they are expected."""

    num: int = Field(256, ge=1)
    distribution: Literal["uniform", "log_uniform", "unigram"] = "unigram"
    alpha: float = Field(0.75, ge=0, description="unigram: probability ~ training count^alpha")


class PredictionNegatives(Negatives):
    """In the place of the catalogue: `num` items for each prediction, or distinct ones for all."""

    shared: bool = False


class MaskedItem(Section):
    """Softmax over the catalogue, or over sampled items where `negatives` is given."""

    name: Literal["masked_item"]
    weight: float = Field(1.0, gt=0)
    mask_fraction: float = Field(0.2, gt=0, lt=1)
    temperature: float = Field(1.0, gt=0)
    negatives: PredictionNegatives | None = None


class NextItem(Section):
    """Softmax over the catalogue, or over sampled items where `negatives` is given."""

    name: Literal["next_item"]
    weight: float = Field(1.0, gt=0)
    temperature: float = Field(1.0, gt=0)
    negatives: PredictionNegatives | None = None


class Contrastive(Section):
    """`views`: two augmentations of a history (NT-Xent); `user_item`: a user and the next item."""

    name: Literal["contrastive"]
    weight: float = Field(1.0, gt=0)
    pairs: Literal["views", "user_item"] = "views"
    similarity: Literal["cosine", "inner"] = Field(
        "cosine", description="inner (with temperature 1) is how items are ranked"
    )
    temperature: float = Field(0.1, gt=0, description="similarities are divided by it")
    learn_temperature: bool = False
    negatives_across_ranks: Literal["gather", "ring"] = Field(
        "gather", description="ring holds the keys of two ranks at a time; the losses are the same"
    )
    negatives: Negatives | None = Field(
        None, description="user_item: items drawn for all beside those of the batch"
    )
    augmentations: tuple[Literal["crop", "mask", "reorder", "dropout"], ...] = Field(
        ("crop", "mask", "reorder"), min_length=1
    )
    crop_fraction: float = Field(0.6, gt=0, le=1, description="part of the history that stays")
    mask_fraction: float = Field(0.3, gt=0, lt=1)
    reorder_fraction: float = Field(0.6, gt=0, le=1)

    @model_validator(mode="after")
    def _views_have_no_items_as_negatives(self) -> Contrastive:
        if self.pairs == "views" and self.negatives is not None:
            raise ValueError(
                'negatives are items, and views are set against views; set pairs to "user_item", '
                "or leave negatives out"
            )
        return self


Objective = Annotated[MaskedItem | NextItem | Contrastive, Field(discriminator="name")]


class TrainConfig(Section):
    """What every training stage shares. `batch_size` counts rows over all ranks together."""

    epochs: int = Field(20, ge=0)
    batch_size: int = Field(128, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    clip_norm: float | None = Field(None, gt=0)
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


class EvaluateConfig(Section):
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 20), min_length=1)
    batch_size: int = Field(256, ge=1)
    baselines: tuple[Literal["popularity", "item_knn", "biases"], ...] = Field(
        (), description="popularity and item_knn rank; biases predict clicks and ratings"
    )


class ExportConfig(Section):
    what: tuple[Literal["items", "users"], ...] = ("items", "users")
    formats: tuple[Literal["parquet", "npy"], ...] = Field(("parquet",), min_length=1)


class ShowConfig(Section):
    """What `run` prints at its end: recommendations for one user."""

    user: str | int | None = Field(None, description="external id; default: the first user")
    k: int = Field(5, ge=1)
    title: str | None = Field(None, description="item feature shown beside the id")


class RunConfig(Section):
    """One TOML file."""

    run_dir: Path
    seed: int = Field(0, ge=0, lt=2**32)
    data: DataConfig
    model: ModelConfig = Field(TransformerConfig(), discriminator="backbone")
    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    show: ShowConfig = ShowConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _is_a_transformer_unless_said(cls, value: Any) -> Any:
        return {"backbone": "transformer", **value} if isinstance(value, dict) else value

    @property
    def prepared_dir(self) -> Path:
        return self.data.prepared or self.run_dir / "prepared"
