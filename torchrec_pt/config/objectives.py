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


class ItemPrediction(Section):
    """Softmax over the catalogue, or over sampled items where `negatives` is given; or bce."""

    name: str
    weight: float = Field(1.0, gt=0)
    temperature: float = Field(1.0, gt=0)
    negatives: PredictionNegatives | None = None
    loss: Literal["softmax", "bce", "gbce"] = Field(
        "softmax", description="bce: each item by itself (SASRec); gbce: calibrated (gSASRec)"
    )
    calibration: float = Field(
        0.75, ge=0, le=1, description="gbce: t, from that of bce (0) to that of no sampling (1)"
    )

    @model_validator(mode="after")
    def _bce_is_told_its_negatives(self) -> ItemPrediction:
        if self.loss != "gbce" and self.calibration != 0.75:
            raise ValueError(
                f'calibration is that of gbce, and loss is "{self.loss}"; set loss to "gbce", or '
                "leave calibration out"
            )
        if self.loss == "softmax":
            return self
        if self.negatives is None:
            raise ValueError(
                f"{self.loss} sets the right item against sampled ones, and negatives is not "
                'given; add negatives, such as { num = 256, distribution = "uniform" }'
            )
        if "distribution" not in self.negatives.model_fields_set:
            raise ValueError(
                f"{self.loss} takes negatives uncorrected, so that their distribution makes the "
                'model; say negatives.distribution: "uniform" (as SASRec and gSASRec do), '
                '"log_uniform" or "unigram"'
            )
        return self


class MaskedItem(ItemPrediction):
    name: Literal["masked_item"]
    mask_fraction: float = Field(0.2, gt=0, lt=1)


class NextItem(ItemPrediction):
    name: Literal["next_item"]


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
    augmentations: tuple[
        Literal["crop", "mask", "reorder", "dropout", "substitute", "insert"], ...
    ] = Field(("crop", "mask", "reorder"), min_length=1)
    crop_fraction: float = Field(0.6, gt=0, le=1, description="part of the history that stays")
    mask_fraction: float = Field(0.3, gt=0, lt=1)
    reorder_fraction: float = Field(0.6, gt=0, le=1)
    substitute_fraction: float = Field(
        0.1, gt=0, le=1, description="of a history's items that give way to correlated ones"
    )
    insert_fraction: float = Field(
        0.4, gt=0, le=1, description="of a history's items that get a correlated one before them"
    )

    @property
    def needs_correlation(self) -> bool:
        """Whether items are replaced or inserted, by those that go best with others."""
        return self.pairs == "views" and not {"substitute", "insert"}.isdisjoint(self.augmentations)

    @model_validator(mode="after")
    def _views_have_no_items_as_negatives(self) -> Contrastive:
        if self.pairs == "views" and self.negatives is not None:
            raise ValueError(
                'negatives are items, and views are set against views; set pairs to "user_item", '
                "or leave negatives out"
            )
        return self


class Autoencoder(Section):
    """The items of a history, or their ratings, from what is left of it."""

    name: Literal["autoencoder"]
    weight: float = Field(1.0, gt=0)
    values: Literal["binary", "rating"] = Field(
        "binary", description="took the item or not, or the rating of those taken (mse alone)"
    )
    loss: Literal["multinomial", "mse", "bce"] = "multinomial"
    corruption: float = Field(0.5, ge=0, lt=1, description="part of the items that is not read")
    temperature: float = Field(1.0, gt=0, description="multinomial")
    positive_weight: float = Field(
        1.0, gt=0, description="mse of binary values: weight of a taken item beside another's 1"
    )
    kl_weight: float | None = Field(
        None, ge=0, description="variational: of the KL divergence at the end; default: 0.2"
    )
    anneal_steps: int = Field(
        0, ge=0, description="variational: batches in which kl_weight grows from 0"
    )

    @model_validator(mode="after")
    def _loss_reads_its_settings(self) -> Autoencoder:
        if self.values == "rating" and self.loss != "mse":
            raise ValueError(f'ratings have no {self.loss} loss; set loss to "mse"')
        if self.temperature != 1 and self.loss != "multinomial":
            raise ValueError(f"the {self.loss} loss has no temperature; leave it out")
        if self.positive_weight != 1 and (self.loss != "mse" or self.values == "rating"):
            raise ValueError(
                "positive_weight is for mse of binary values; leave it out, or set loss to "
                '"mse" and values to "binary"'
            )
        return self


class NextSegment(Section):
    """Whether the second part of a history follows the first one, or is another history's."""

    name: Literal["next_segment"]
    weight: float = Field(1.0, gt=0)


class Denoising(ItemPrediction):
    """The items of a history from a corrupted one, each row by one of the corruptions."""

    name: Literal["denoising"]
    corruptions: tuple[Literal["delete", "infill", "shuffle", "replace"], ...] = Field(
        ("delete", "infill", "shuffle", "replace"), min_length=1
    )
    delete_fraction: float = Field(0.3, gt=0, lt=1)
    infill_fraction: float = Field(
        0.3, gt=0, lt=1, description="items that spans would hide if none overlapped"
    )
    shuffle_fraction: float = Field(0.6, gt=0, le=1)
    replace_fraction: float = Field(0.3, gt=0, lt=1)


Objective = Annotated[
    MaskedItem | NextItem | Contrastive | NextSegment | Denoising | Autoencoder,
    Field(discriminator="name"),
]
