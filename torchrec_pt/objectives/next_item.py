"""Next item prediction at every position (SASRec, Kang and McAuley 2018)."""

from __future__ import annotations

from torch import nn

from torchrec_pt.config import ModelConfig, NextItem
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.item_softmax import CatalogueSoftmax, ItemLoss
from torchrec_pt.objectives.loss_term import LossTerm, with_attention
from torchrec_pt.objectives.windows import draw_windows


class NextItemObjective(nn.Module):
    """Every item of a history but the first is predicted from those before it.

    Softmax over the catalogue, as in gSASRec's and RecTools' softmax variants, or over sampled
    items, or binary cross-entropy, as in SASRec and gSASRec. Needs causal attention.
    """

    def __init__(
        self, config: NextItem, model: ModelConfig, item_loss: ItemLoss | None = None
    ) -> None:
        super().__init__()
        model = with_attention(
            config.name,
            model,
            "causal",
            reason="must not see the next item",
            instead="masked_item",
        )
        self.name = config.name
        self.scale = config.weight
        self.temperature = config.temperature
        self.max_length = model.max_length
        self.item_loss = item_loss or CatalogueSoftmax()
        self.needs_catalogue = self.item_loss.needs_catalogue

    def draw(self, rows: Rows) -> Draw:
        window = draw_windows(rows, self.max_length + 1, "next_item.window")
        history = window.windows(0 * window.lengths, (window.lengths - 1).clamp(min=0))
        target = window.values[window.positions > 0]
        drawn = self.item_loss.draw(target, rows, history.rows, history.positions)
        return Draw(lookups={"history": history, **drawn.lookups}, tensors=drawn.tensors)

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm:
        assert isinstance(backbone, Transformer)
        query = backbone.encode_positions(drawn.vectors["history"], keys.noise)
        return self.item_loss.loss(query, backbone, drawn, catalogue, self.temperature)
