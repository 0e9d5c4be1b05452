"""The original sequence from a corrupted one (BART, Lewis et al. 2020, section 2)."""

from __future__ import annotations

from torch import nn

from torchrec_pt.config import Denoising, ModelConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.decoder import Decoder
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.corruptions import corrupt
from torchrec_pt.objectives.item_softmax import CatalogueSoftmax, ItemLoss
from torchrec_pt.objectives.loss_term import LossTerm, with_attention
from torchrec_pt.objectives.windows import draw_windows


class DenoisingObjective(nn.Module):
    """The backbone encodes a corrupted history; a causal decoder finds every original item.

    Softmax over the catalogue, or over sampled items. Needs bidirectional attention. The decoder
    belongs to the objective: fine-tuning starts without it.

    Args:
        num_trained: items that training counted, which come first; they replace others.
    """

    def __init__(
        self,
        config: Denoising,
        model: ModelConfig,
        num_trained: int,
        item_loss: ItemLoss | None = None,
    ) -> None:
        super().__init__()
        model = with_attention(
            config.name,
            model,
            "bidirectional",
            reason="reads both sides of what is corrupted",
            instead="next_item",
        )
        self.name = config.name
        self.scale = config.weight
        self.config = config
        self.max_length = model.max_length
        self.num_trained = num_trained
        self.temperature = config.temperature
        self.item_loss = item_loss or CatalogueSoftmax()
        self.needs_catalogue = self.item_loss.needs_catalogue
        self.decoder = Decoder(model)

    def draw(self, rows: Rows) -> Draw:
        history = draw_windows(rows, self.max_length, "denoising.window")
        corrupted, is_masked = corrupt(history, self.config, rows.noise, self.num_trained)
        drawn = self.item_loss.draw(history.values, rows, history.rows, history.positions)
        return Draw(
            lookups={"history": history, "corrupted": corrupted, **drawn.lookups},
            tensors={"is_masked": is_masked, **drawn.tensors},
        )

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm:
        assert isinstance(backbone, Transformer)
        corrupted = drawn.vectors["corrupted"]
        encoded = backbone.encode_positions(
            corrupted, keys.noise, is_masked=drawn.tensors["is_masked"]
        )
        decoded = self.decoder(drawn.vectors["history"], corrupted.with_values(encoded), keys.noise)
        query = backbone.scaled(decoded)
        return self.item_loss.loss(query, backbone, drawn, catalogue, self.temperature)
