"""Softmax that finds one item: among the catalogue, or among sampled items.

Either, as the binary cross-entropy of `item_bce`, has `draw` with the batch, then `loss` with the
queries that the model made of it:

    target: (Q,) int64, the item that each prediction should find.
    row, position: (Q,) int64, the row of the batch that it belongs to, and its place there.
    query: (Q, D), one for each target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from torchrec_pt import rng
from torchrec_pt.config import Negatives, PredictionNegatives
from torchrec_pt.data.batch import Draw, Embedded, Rows
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.ops import NegativeSampler, SampledNegatives, sampled_softmax_loss


class CatalogueSoftmax:
    needs_catalogue = True

    def draw(self, target: Tensor, rows: Rows, row: Tensor, position: Tensor) -> Draw:
        return Draw(tensors={"target": target})

    def loss(
        self,
        query: Tensor,
        backbone: Backbone,
        drawn: Embedded,
        catalogue: Catalogue | None,
        temperature: float,
    ) -> LossTerm:
        assert catalogue is not None
        target = drawn.tensors["target"]
        row_weight = query.new_ones(len(target))
        total = catalogue.softmax_loss(query, target, row_weight, temperature=temperature)
        return LossTerm(total, row_weight.sum())


class SampledItems(ABC):
    """The items of a step, right ones and negatives, are looked up once each.

    Args:
        name: of the objective; each draws negatives of its own.
        max_length: above every position.
    Raises:
        ValueError: more distinct negatives are asked than there are items.
    """

    needs_catalogue = False

    def __init__(
        self,
        config: PredictionNegatives,
        item_counts: Tensor,
        *,
        seed: int,
        name: str,
        max_length: int,
    ) -> None:
        self.sampler = build_sampler(config, item_counts, seed=seed, name=name)
        self.shared = config.shared
        self.max_length = max_length
        if self.shared:
            self.sampler.sample_shared(step=0, unique=True)

    def draw(self, target: Tensor, rows: Rows, row: Tensor, position: Tensor) -> Draw:
        negatives = self._sample(rows, row, position)
        every = torch.cat([target, negatives.ids.flatten()])
        ids, places = every.unique(return_inverse=True)
        positive, negative = places.split([len(target), negatives.ids.numel()])
        return Draw(
            lookups={"items": Jagged(ids, torch.tensor([0, len(ids)]))},
            tensors={
                "positive": positive,
                "negatives": negative.view(negatives.ids.shape),
                "log_q": negatives.log_q,
            },
        )

    def _sample(self, rows: Rows, row: Tensor, position: Tensor) -> SampledNegatives:
        step = rows.noise.step
        if self.shared:
            return self.sampler.sample_shared(step=step, unique=True)
        # A number of its own for each prediction, the same on any number of ranks.
        return self.sampler.sample(rows.noise.rows[row] * self.max_length + position, step=step)

    def loss(
        self,
        query: Tensor,
        backbone: Backbone,
        drawn: Embedded,
        catalogue: Catalogue | None,
        temperature: float,
    ) -> LossTerm:
        items = backbone.encode_items(drawn.ids["items"].values, drawn.vectors["items"].values)
        total = self.total(query, items, drawn.tensors, temperature)
        return LossTerm(total, query.new_tensor(float(len(query))))

    @abstractmethod
    def total(
        self, query: Tensor, items: Tensor, drawn: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        """0-dim, the sum of the predictions' losses; `drawn` as `draw` made it."""


class SampledSoftmax(SampledItems):
    """Corrected by how often each negative is expected."""

    def total(
        self, query: Tensor, items: Tensor, drawn: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        return sampled_softmax_loss(
            query,
            items,
            drawn["positive"],
            drawn["negatives"],
            temperature=temperature,
            log_q_negatives=drawn["log_q"],
            reduction="sum",
            sparse=False,
        )


ItemLoss = CatalogueSoftmax | SampledItems


def build_sampler(
    config: Negatives, item_counts: Tensor, *, seed: int, name: str
) -> NegativeSampler:
    """For the objective `name` of a run with this seed; an item never counted counts as one."""
    return NegativeSampler(
        len(item_counts),
        config.num,
        distribution=config.distribution,
        counts=item_counts.clamp(min=1) if config.distribution == "unigram" else None,
        alpha=config.alpha,
        seed=rng.key(seed, name, "negatives") % 2**32,
    )
