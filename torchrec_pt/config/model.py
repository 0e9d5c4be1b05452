"""The backbones and the item table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from torchrec_pt.config.section import Section


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

    @property
    def row_dim(self) -> int:
        """Columns of the item table, of which an item's vector is made."""
        return self.dim

    @property
    def history_length(self) -> int:
        """Items of a history that a user's vector reads."""
        return self.max_length


class TransformerConfig(BackboneConfig):
    """Self-attention over the history: causal as SASRec, bidirectional as BERT4Rec."""

    backbone: Literal["transformer"] = "transformer"
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(2, ge=1)
    ffn_dim: int | None = Field(None, ge=1, description="default: 4 × dim")
    attention: Literal["causal", "bidirectional"] = "bidirectional"
    positions: Literal["learned", "rotary", "relative_time"] = Field(
        "learned",
        description="a vector a position; rotations of queries and keys; or a bias of attention by "
        "distance and by the time between, which needs timestamps",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of num_heads ({self.num_heads})")
        if self.positions == "rotary" and self.dim // self.num_heads % 2:
            raise ValueError(
                'positions = "rotary" turns pairs of a head\'s dimensions: dim / num_heads must be '
                f"even, given {self.dim} / {self.num_heads}; change num_heads"
            )
        return self

    @property
    def history_length(self) -> int:
        """A bidirectional model appends [MASK]."""
        return self.max_length if self.attention == "causal" else self.max_length - 1


class TwoTowerConfig(BackboneConfig):
    """A tower for users (pooled history, features) and one for items (row, features)."""

    backbone: Literal["two_tower"]
    hidden_dims: tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...] = (128,)


class AutoencoderConfig(BackboneConfig):
    """The history as a bag of items, encoded to a user; plain (MultiDAE) or variational (MultiVAE).

    `hidden_dims` are the encoder's tanh layers. The first is the embedding bag itself, so an item's
    row has that many columns for the encoder and `dim` for the decoder. None: a linear encoder.
    """

    backbone: Literal["autoencoder"]
    max_length: int = Field(200, ge=2, description="newest items of a history that are read")
    hidden_dims: tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...] = (200,)
    variational: bool = Field(False, description="users are normal distributions, while trained")

    @model_validator(mode="after")
    def _ranks_by_inner_product(self) -> AutoencoderConfig:
        if self.similarity != "inner":
            raise ValueError(
                f'similarity is "{self.similarity}", and an autoencoder\'s items have biases, '
                'which a cosine would lose; set it to "inner"'
            )
        return self

    @property
    def input_dim(self) -> int:
        """Columns of an item's row that the encoder reads."""
        return self.hidden_dims[0] if self.hidden_dims else self.dim

    @property
    def row_dim(self) -> int:
        return self.input_dim + self.dim


ModelConfig = TransformerConfig | TwoTowerConfig | AutoencoderConfig
