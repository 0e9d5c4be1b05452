"""Contrastive pretraining: two views of one history, or a user and the item that came next.

views: NT-Xent (Chen et al. 2020, SimCLR, section 2.1) over augmented histories (`augmentations`).
user_item: InfoNCE with in-batch negatives, and sampled ones beside them (Yang et al. 2020, Mixed
Negative Sampling), corrected by how often they are expected (`negatives`).
Negatives come from all ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import Contrastive, ModelConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import sum_over_ranks
from torchrec_pt.global_negatives import AcrossRanks, Keys, gathered_infonce_loss
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.negatives import InBatch, Sampled, Source, join_keys
from torchrec_pt.objectives.augmentations import Augmentations
from torchrec_pt.objectives.item_softmax import build_sampler
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.objectives.windows import draw_windows
from torchrec_pt.ring import ring_infonce_loss

LOSSES: dict[str, AcrossRanks] = {"gather": gathered_infonce_loss, "ring": ring_infonce_loss}


class ContrastiveObjective(nn.Module):
    """Either kind of pairs.

    Args:
        item_counts: (num_items,) training counts, for the correction of in-batch negatives.
        most_correlated: (num_items,) int64, where an augmentation needs it.
    """

    needs_catalogue = False

    def __init__(
        self,
        config: Contrastive,
        model: ModelConfig,
        item_counts: Tensor,
        *,
        seed: int,
        most_correlated: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.name = config.name
        self.scale = config.weight
        self.config = config
        self._infonce = LOSSES[config.negatives_across_ranks]
        self.max_length = model.history_length
        self.augment = Augmentations(config, self.max_length, most_correlated)
        # exp keeps it positive while it is learned (CLIP, Radford et al. 2021, section 2.5).
        log_temperature = torch.tensor(math.log(config.temperature))
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=config.learn_temperature)
        share = item_counts.clamp(min=1) / item_counts.sum().clamp(min=1)
        self.log_share: Tensor
        self.register_buffer("log_share", share.log().float(), persistent=False)
        self.sampler = None
        if config.negatives is not None:
            self.sampler = build_sampler(config.negatives, item_counts, seed=seed, name=config.name)

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.config.similarity == "cosine" else vectors

    # --- drawing ---------------------------------------------------------------------------

    def draw(self, rows: Rows) -> Draw:
        return self._draw_views(rows) if self.config.pairs == "views" else self._draw_pairs(rows)

    def _draw_views(self, rows: Rows) -> Draw:
        history = draw_windows(rows, self.max_length, "contrastive.window")
        both = Jagged.stack([history, history])
        views, is_masked = self.augment(both, rows.noise.copies(2))
        return Draw(lookups={"views": views}, tensors={"is_masked": is_masked})

    def _draw_pairs(self, rows: Rows) -> Draw:
        # The item right after a drawn window; the window may be empty for a bidirectional model.
        window = draw_windows(rows, self.max_length + 1, "contrastive.window")
        lengths = window.lengths
        has_target = lengths > 1
        history = window.windows(0 * lengths, (lengths - 1).clamp(min=0))
        last = (window.offsets[1:] - 1).clamp(min=0)
        target = torch.where(has_target, window.values[last], 0) if len(window.values) else 0 * last
        lookups = {"history": history, "item": Jagged(target, torch.arange(rows.num_rows + 1))}
        if self.sampler is not None:
            # The same on every rank; each looks up its part.
            drawn = self.sampler.sample_shared(step=rows.noise.step).ids
            mine = drawn[dist.get_rank() :: dist.get_world_size()]
            lookups["negatives"] = Jagged(mine, torch.tensor([0, len(mine)]))
        return Draw(lookups=lookups, tensors={"has_target": has_target})

    # --- loss ------------------------------------------------------------------------------

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm:
        if self.config.pairs == "views":
            return self._views_loss(backbone, drawn, keys)
        return self._pairs_loss(backbone, drawn, keys)

    def _views_loss(self, backbone: Backbone, drawn: Embedded, keys: RowKeys) -> LossTerm:
        keys = keys.copies(2)
        encoded = backbone.encode_users(
            keys.users, drawn.vectors["views"], keys.noise, is_masked=drawn.tensors["is_masked"]
        )
        view, weight = self._scaled(encoded), keys.weight
        own = torch.arange(len(view), device=view.device)
        total = self._infonce(
            view,
            Keys(view, log_q=_without_padding(weight)),
            own.roll(len(view) // 2),
            temperature=self.temperature,
            # Every rank holds equally many.
            self_index=dist.get_rank() * len(view) + own,
            row_weight=weight,
        )
        return LossTerm(total, weight.sum())

    def _pairs_loss(self, backbone: Backbone, drawn: Embedded, keys: RowKeys) -> LossTerm:
        user = backbone.encode_users(keys.users, drawn.vectors["history"], keys.noise)
        weight = keys.weight * drawn.tensors["has_target"]
        num_others = (sum_over_ranks(weight.sum()) - 1).clamp(min=torch.finfo(torch.float32).tiny)
        parts = [self._items(backbone, drawn, "item")]
        sources: list[Source] = [InBatch(self.log_share, num_others)]
        if self.sampler is not None:
            parts.append(self._items(backbone, drawn, "negatives"))
            sources.append(Sampled(self.sampler))
        joined = join_keys(parts, sources)
        assert joined.log_q is not None
        is_there = F.pad(weight, (0, len(joined.vectors) - len(weight)), value=1.0)
        total = self._infonce(
            self._scaled(user),
            joined._replace(log_q=joined.log_q + _without_padding(is_there)),
            temperature=self.temperature,
            row_weight=weight,
        )
        return LossTerm(total, weight.sum())

    def _items(self, backbone: Backbone, drawn: Embedded, name: str) -> tuple[Tensor, Tensor]:
        ids = drawn.ids[name].values
        return self._scaled(backbone.encode_items(ids, drawn.vectors[name].values)), ids


def _without_padding(weight: Tensor) -> Tensor:
    """log_q that takes keys of weight 0 out of the softmax."""
    return torch.where(weight > 0, 0.0, torch.inf)
