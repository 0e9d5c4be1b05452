"""Next item prediction at every position (SASRec, Kang and McAuley 2018), by full softmax."""

from __future__ import annotations

from torch import nn

from torchrec_pt.config import ModelConfig, NextItem
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.loss_term import LossTerm, with_positions
from torchrec_pt.objectives.windows import draw_windows


class NextItemObjective(nn.Module):
    """Every item of a history but the first is predicted from those before it.

    Full softmax over the catalogue, as in gSASRec's and RecTools' softmax variants. Needs
    causal attention.
    """

    needs_catalogue = True

    def __init__(self, config: NextItem, model: ModelConfig) -> None:
        super().__init__()
        model = with_positions(config.name, model)
        if model.attention != "causal":
            raise ValueError(
                "pretrain.objectives: next_item must not see the next item; "
                f'model.attention is "{model.attention}"; set it to "causal", or use masked_item'
            )
        self.name = config.name
        self.scale = config.weight
        self.temperature = config.temperature
        self.max_length = model.max_length

    def draw(self, rows: Rows) -> Draw:
        window = draw_windows(rows, self.max_length + 1, "next_item.window")
        history = window.windows(0 * window.lengths, (window.lengths - 1).clamp(min=0))
        return Draw(
            lookups={"history": history},
            tensors={"target": window.values[window.positions > 0]},
        )

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm:
        assert isinstance(backbone, Transformer)
        assert catalogue is not None
        query = backbone.encode_positions(drawn.vectors["history"], keys.noise)
        target = drawn.tensors["target"]
        row_weight = query.new_ones(len(target))
        total = catalogue.softmax_loss(query, target, row_weight, temperature=self.temperature)
        return LossTerm(total, row_weight.sum())
