"""A whole run: one TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from torchrec_pt.config.data import DataConfig
from torchrec_pt.config.export import ExportConfig
from torchrec_pt.config.model import ModelConfig, TransformerConfig
from torchrec_pt.config.section import Section
from torchrec_pt.config.tasks import FinetuneConfig
from torchrec_pt.config.training import PretrainConfig
from torchrec_pt.config.tune import TuneConfig


class Candidates(Section):
    """What a test item is ranked against in the sampled protocol, beside the full catalogue."""

    num: int | None = Field(None, ge=1, description="items drawn that the user never took")
    seed: int = Field(0, ge=0, lt=2**32, description="of the items drawn")
    path: Path | None = Field(
        None, description="instead, a Parquet file with the columns user and item"
    )

    @model_validator(mode="after")
    def _are_drawn_or_given(self) -> Candidates:
        if (self.num is None) == (self.path is None):
            raise ValueError("needs num, to draw candidates, or path, to read them; give one")
        if self.path is not None and self.seed:
            raise ValueError("seed is of drawn candidates; leave it out beside path")
        return self


class EvaluateConfig(Section):
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 20), min_length=1)
    batch_size: int = Field(256, ge=1)
    baselines: tuple[Literal["popularity", "item_knn", "biases"], ...] = Field(
        (), description="popularity and item_knn rank; biases predict clicks and ratings"
    )
    candidates: Candidates | None = Field(
        None, description="ranks by the sampled protocol too: num = 99, or path"
    )


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
    tune: TuneConfig | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _is_a_transformer_unless_said(cls, value: Any) -> Any:
        return {"backbone": "transformer", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _starts_from_one_model(self) -> RunConfig:
        if self.pretrain is not None and self.finetune.start_from is not None:
            raise ValueError(
                "finetune.start_from takes the place of pretraining; drop it, or drop [pretrain]"
            )
        return self

    @property
    def prepared_dir(self) -> Path:
        return self.data.prepared or self.run_dir / "prepared"
