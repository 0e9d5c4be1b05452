"""Which raw files, which columns of them, and how they are filtered and split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from torchrec_pt.config.section import Section


class Columns(Section):
    """The names that the raw files give to the columns we need."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = None
    rating: str | None = None
    label: str | None = Field(
        None,
        description="above 0: the user took the item; else it was shown and not taken, which ctr "
        "learns from and ranking takes as a negative",
    )
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
    encoder: str | None = Field(
        None,
        description="text: a sentence-transformers model (its folder, or its name in the local "
        "cache) whose vectors models read; without one a text is shown, not read",
    )

    @model_validator(mode="after")
    def _encoder_has_text(self) -> Feature:
        if self.encoder is not None and (self.kind != "text" or self.of == "interaction"):
            raise ValueError(
                f"an encoder is for the texts of users and items, {self.column} is {self.kind} of "
                f"{self.of}; drop the encoder"
            )
        return self


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
    keep_unseen_items: bool = Field(
        False,
        description="items of the item file that no kept interaction has: true makes them part of "
        "the catalogue, known by their features alone",
    )
    filters: Filters = Filters()
    split: Split = LeaveOneOutSplit()
