"""What pretraining predicts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from torchrec_pt.config.section import Section


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


class NextSegment(Section):
    """Whether the second part of a history follows the first one, or is another history's."""

    name: Literal["next_segment"]
    weight: float = Field(1.0, gt=0)


class Denoising(Section):
    """The items of a history from a corrupted one, each row by one of the corruptions.

    Softmax over the catalogue, or over sampled items where `negatives` is given.
    """

    name: Literal["denoising"]
    weight: float = Field(1.0, gt=0)
    corruptions: tuple[Literal["delete", "infill", "shuffle", "replace"], ...] = Field(
        ("delete", "infill", "shuffle", "replace"), min_length=1
    )
    delete_fraction: float = Field(0.3, gt=0, lt=1)
    infill_fraction: float = Field(
        0.3, gt=0, lt=1, description="items that spans would hide if none overlapped"
    )
    shuffle_fraction: float = Field(0.6, gt=0, le=1)
    replace_fraction: float = Field(0.3, gt=0, lt=1)
    temperature: float = Field(1.0, gt=0)
    negatives: PredictionNegatives | None = None


Objective = Annotated[
    MaskedItem | NextItem | Contrastive | NextSegment | Denoising, Field(discriminator="name")
]
