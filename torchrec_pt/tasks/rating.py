"""Rating: the number of stars that a user gives an item."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.config import ModelConfig, RatingConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.splits import TRAIN
from torchrec_pt.distributed import gather_objects, sum_over_ranks
from torchrec_pt.tasks.pairs import PairTask


class RatingTask(PairTask):
    """Predictions are clipped to the range of the training ratings.

    mse: squared errors.  rmse: the root of their mean over a step.  huber: squared up to
    `huber_delta`, linear beyond (Huber 1964).
    """

    name = "rating"
    config: RatingConfig

    def __init__(
        self, config: RatingConfig, model: ModelConfig, dataset: PreparedDataset, *, seed: int
    ) -> None:
        if dataset.rating is None:
            raise ValueError(
                "finetune.rating: needs ratings, data.columns.rating is not set; set it"
            )
        super().__init__(config, model, dataset, dataset.rating, seed=seed)
        seen = dataset.rating[dataset.split == TRAIN]
        extremes = [ends for ends in gather_objects(_extremes(seen)) if ends]
        self._lowest = min(lowest for lowest, _ in extremes)
        self._highest = max(highest for _, highest in extremes)

    @property
    def information(self) -> float:
        return 1.0

    def link(self, deviation: Tensor) -> Tensor:
        return self.mean + deviation

    def final(self, linked: Tensor) -> Tensor:
        return linked.clamp(self._lowest, self._highest)

    def total_loss(self, linked: Tensor, labels: Tensor) -> Tensor:
        if self.config.loss == "huber":
            return F.huber_loss(linked, labels, reduction="sum", delta=self.config.huber_delta)
        total = (linked - labels).square().sum()
        if self.config.loss == "mse":
            return total
        # √m and its gradient, as a sum over all ranks' pairs: m / (2 √m), and a constant √m / 2.
        num_here = torch.full_like(total, len(labels))
        square, num = sum_over_ranks(torch.stack([total, num_here]))
        root = (square / num.clamp(min=1)).sqrt().clamp(min=1e-6)
        return total / (2 * root) + len(labels) * root / 2


def _extremes(ratings: Tensor) -> tuple[float, float] | None:
    return (float(ratings.min()), float(ratings.max())) if len(ratings) else None
