"""Every configuration type of a run, and the TOML loader.

A run is one TOML file. Each section below is a frozen pydantic model that
forbids unknown keys, so a misspelt key is an error that names its neighbour.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from torchrec_pt.config_errors import explain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A configuration the user can mend; the message is one line."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """Stable hash of this section's resolved values; names stages that may be reused."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
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
    """

    placement: Literal["auto", "replicated", "table_wise", "row_wise", "column_wise"] = "auto"
    optimizer: Literal["auto", "adamw", "sgd", "adagrad", "rowwise_adagrad"] = "auto"
    learning_rate: float | None = Field(None, gt=0, description="default: that of the stage")
    replicated_max_mb: float = Field(256, gt=0, description="`auto` replicates below this")


class ModelConfig(Section):
    backbone: Literal["transformer"] = "transformer"
    dim: int = Field(64, ge=8, multiple_of=8)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(2, ge=1)
    ffn_dim: int | None = Field(None, ge=1, description="default: 4 × dim")
    max_length: int = Field(50, ge=2, description="newest items of a history that are read")
    attention: Literal["causal", "bidirectional"] = "bidirectional"
    dropout: float = Field(0.2, ge=0, le=0.99)
    item_table: TableConfig = TableConfig()

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of num_heads ({self.num_heads})")
        return self


# --- objectives and tasks -----------------------------------------------------------------------


class MaskedItem(Section):
    name: Literal["masked_item"]
    weight: float = Field(1.0, gt=0)
    mask_fraction: float = Field(0.2, gt=0, lt=1)
    temperature: float = Field(1.0, gt=0)


class NextItem(Section):
    name: Literal["next_item"]
    weight: float = Field(1.0, gt=0)
    temperature: float = Field(1.0, gt=0)


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
    augmentations: tuple[Literal["crop", "mask", "reorder", "dropout"], ...] = Field(
        ("crop", "mask", "reorder"), min_length=1
    )
    crop_fraction: float = Field(0.6, gt=0, le=1, description="part of the history that stays")
    mask_fraction: float = Field(0.3, gt=0, lt=1)
    reorder_fraction: float = Field(0.6, gt=0, le=1)


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


class PretrainConfig(TrainConfig):
    objectives: tuple[Objective, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> PretrainConfig:
        names = [objective.name for objective in self.objectives]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'objective "{name}" is given twice; merge the two')
        return self


class RankingConfig(TrainConfig):
    """Next-item ranking. `softmax` is listwise over the catalogue, `bpr` pairwise."""

    loss: Literal["softmax", "bpr"] = "softmax"
    temperature: float = Field(1.0, gt=0)
    targets_per_user: int = Field(1, ge=1, description="history cuts of a user in one step")
    num_negatives: int = Field(16, ge=1, description="bpr: sampled negatives of a target")
    control: Literal["scratch"] | None = None


class FinetuneConfig(Section):
    ranking: RankingConfig | None = None


class EvaluateConfig(Section):
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 20), min_length=1)
    batch_size: int = Field(256, ge=1)
    baselines: tuple[Literal["popularity", "item_knn"], ...] = ()


class ExportConfig(Section):
    what: tuple[Literal["items", "users"], ...] = ("items", "users")


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
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    show: ShowConfig = ShowConfig()

    @property
    def prepared_dir(self) -> Path:
        return self.data.prepared or self.run_dir / "prepared"


# --- loading ------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply `a.b=value` overrides (values in TOML, bare words as strings).

    Relative paths are taken from the current directory.

    Raises:
        ConfigError: unreadable file, bad TOML, unknown key, bad value or bad override.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, RunConfig)}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f'--set {override}: want key.path=value, such as "pretrain.epochs=3"')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    node: Any = raw
    for depth, key in enumerate(keys):
        step: Any = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f'--set {override}: "{key}" is no index of a list of {len(node)}')
            step = int(key)
        elif not isinstance(node, dict):
            raise ConfigError(f'--set {override}: "{keys[depth - 1]}" has no keys below it')
        if depth == len(keys) - 1:
            node[step] = value
        else:
            node = node[step] if isinstance(node, list) else node.setdefault(key, {})
