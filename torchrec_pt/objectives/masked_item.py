"""Masked item prediction (BERT4Rec, Sun et al. 2019, section 3.6)."""

from __future__ import annotations

import torch
from torch import nn

from torchrec_pt.config import MaskedItem, ModelConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.loss_term import LossTerm, with_positions
from torchrec_pt.objectives.windows import draw_windows


class MaskedItemObjective(nn.Module):
    """Each item of a history is hidden with probability `mask_fraction`, at least one a row.

    Full softmax over the catalogue at the hidden positions. Needs bidirectional attention.
    """

    needs_catalogue = True

    def __init__(self, config: MaskedItem, model: ModelConfig) -> None:
        super().__init__()
        model = with_positions(config.name, model)
        if model.attention != "bidirectional":
            raise ValueError(
                "pretrain.objectives: masked_item reads both sides of a masked item; "
                f'model.attention is "{model.attention}"; set it to "bidirectional", '
                "or use next_item"
            )
        self.name = config.name
        self.scale = config.weight
        self.mask_fraction = config.mask_fraction
        self.temperature = config.temperature
        self.max_length = model.max_length

    def draw(self, rows: Rows) -> Draw:
        history = draw_windows(rows, self.max_length, "masked_item.window")
        row = history.rows
        lot = rows.noise.per_token("masked_item.mask", row, history.positions)
        lowest = torch.full((rows.num_rows,), torch.inf).scatter_reduce(0, row, lot, "amin")
        is_masked = (lot < self.mask_fraction) | (lot == lowest[row])
        return Draw(
            lookups={"history": history},
            tensors={"is_masked": is_masked, "target": history.values[is_masked]},
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
        is_masked, target = drawn.tensors["is_masked"], drawn.tensors["target"]
        encoded = backbone.encode_positions(
            drawn.vectors["history"], keys.noise, is_masked=is_masked
        )
        query = encoded[is_masked]
        row_weight = query.new_ones(len(target))
        total = catalogue.softmax_loss(query, target, row_weight, temperature=self.temperature)
        return LossTerm(total, row_weight.sum())
