"""Ranking: which item a user takes next, by the inner product of user and item vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from torchrec_pt import rng
from torchrec_pt.config import ModelConfig, RankingConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.ops import NegativeSampler


class RankingTask(nn.Module):
    """Histories are cut at random; the item after the cut is to rank above the others.

    softmax: listwise over the whole catalogue.  bpr: pairwise against sampled items that the
    user never took in training (Rendle et al. 2009).
    """

    name = "ranking"
    scale = 1.0

    def __init__(
        self, config: RankingConfig, model: ModelConfig, num_items: int, *, seed: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.max_length = model.history_length
        self.needs_catalogue = config.loss == "softmax"
        self.sampler = NegativeSampler(
            num_items, config.num_negatives, seed=rng.key(seed, "ranking.negatives") % 2**32
        )

    def draw(self, rows: Rows) -> Draw:
        copies = self.config.targets_per_user
        histories = Jagged.stack([rows.histories] * copies)
        noise = rows.noise.copies(copies)
        lengths = histories.lengths
        has_target = lengths > 1  # the first item has no history to be predicted from
        lot = noise.per_row("ranking.cut", 1).squeeze(1)
        cut = 1 + (lot * (lengths - 1)).long().clamp(min=0)
        cut = torch.where(has_target, cut.minimum(lengths - 1), 0)
        read = cut.clamp(max=self.max_length)
        history = histories.windows(cut - read, read)
        at = histories.offsets[:-1] + cut
        target = torch.zeros_like(cut)
        target[has_target] = histories.values[at[has_target]]
        tensors = {"target": target, "weight": rows.weight.repeat(copies) * has_target}
        if self.config.loss == "softmax":
            return Draw(lookups={"history": history}, tensors=tensors)

        taken = histories.to_sets()
        has_others = taken.lengths < self.num_items
        taken = taken.filter(has_others[taken.rows])  # who took everything counts for nothing
        negatives = self.sampler.sample(noise.rows, step=noise.step, exclude=taken).ids
        one_each = torch.arange(len(cut) + 1)
        return Draw(
            lookups={
                "history": history,
                "target": Jagged(target, one_each),
                "negatives": Jagged(negatives.flatten(), one_each * self.config.num_negatives),
            },
            tensors=tensors | {"weight": tensors["weight"] * has_others},
        )

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm:
        keys = keys.copies(self.config.targets_per_user)
        user = backbone.encode_users(keys.users, drawn.vectors["history"], keys.noise)
        row_weight = drawn.tensors["weight"]
        temperature = self.config.temperature
        if self.config.loss == "softmax":
            assert catalogue is not None
            target = drawn.tensors["target"]
            total = catalogue.softmax_loss(user, target, row_weight, temperature=temperature)
            return LossTerm(total, row_weight.sum())

        positive, negatives = (
            backbone.encode_items(drawn.ids[name].values, drawn.vectors[name].values)
            for name in ("target", "negatives")
        )
        negatives = negatives.unflatten(0, (len(user), self.config.num_negatives))
        margin = (user * positive).sum(1, keepdim=True) - torch.einsum(
            "bd,bnd->bn", user, negatives
        )
        loss = F.softplus(-margin / temperature).mean(1)
        return LossTerm((loss * row_weight).sum(), row_weight.sum())
