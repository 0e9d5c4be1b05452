"""Masked item prediction (BERT4Rec, Sun et al. 2019, section 3.6)."""

from __future__ import annotations

from torch import nn

from torchrec_pt.config import MaskedItem, ModelConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.item_softmax import CatalogueSoftmax, ItemLoss
from torchrec_pt.objectives.loss_term import LossTerm, with_attention
from torchrec_pt.objectives.lots import has_lowest
from torchrec_pt.objectives.windows import draw_windows


class MaskedItemObjective(nn.Module):
    """Each item of a history is hidden with probability `mask_fraction`, at least one a row.

    Softmax over the catalogue or over sampled items, or binary cross-entropy, at the hidden
    positions. Needs bidirectional attention.
    """

    def __init__(
        self, config: MaskedItem, model: ModelConfig, item_loss: ItemLoss | None = None
    ) -> None:
        super().__init__()
        model = with_attention(
            config.name,
            model,
            "bidirectional",
            reason="reads both sides of a masked item",
            instead="next_item",
        )
        self.name = config.name
        self.scale = config.weight
        self.mask_fraction = config.mask_fraction
        self.temperature = config.temperature
        self.max_length = model.max_length
        self.item_loss = item_loss or CatalogueSoftmax()
        self.needs_catalogue = self.item_loss.needs_catalogue

    def draw(self, rows: Rows) -> Draw:
        history = draw_windows(rows, self.max_length, "masked_item.window")
        row = history.rows
        lot = rows.noise.per_token("masked_item.mask", row, history.positions)
        is_masked = (lot < self.mask_fraction) | has_lowest(history.with_values(lot))
        target = history.values[is_masked]
        drawn = self.item_loss.draw(target, rows, row[is_masked], history.positions[is_masked])
        return Draw(
            lookups={"history": history, **drawn.lookups},
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
        is_masked = drawn.tensors["is_masked"]
        encoded = backbone.encode_positions(
            drawn.vectors["history"], keys.noise, is_masked=is_masked
        )
        query = encoded[is_masked]
        return self.item_loss.loss(query, backbone, drawn, catalogue, self.temperature)
