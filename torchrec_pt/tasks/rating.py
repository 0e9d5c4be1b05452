"""Rating: the number of stars that a user gives an item, by squared error."""

from __future__ import annotations

from torch import Tensor

from torchrec_pt.config import ModelConfig, RatingConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.splits import TRAIN
from torchrec_pt.tasks.pairs import PairTask


class RatingTask(PairTask):
    """Predictions are clipped to the range of the training ratings."""

    name = "rating"

    def __init__(self, config: RatingConfig, model: ModelConfig, dataset: PreparedDataset) -> None:
        if dataset.rating is None:
            raise ValueError(
                "finetune.rating: needs ratings, data.columns.rating is not set; set it"
            )
        super().__init__(config, model, dataset, dataset.rating)
        seen = dataset.rating[dataset.split == TRAIN]
        self._lowest, self._highest = float(seen.min()), float(seen.max())

    @property
    def information(self) -> float:
        return 1.0

    def link(self, deviation: Tensor) -> Tensor:
        return self.mean + deviation

    def final(self, linked: Tensor) -> Tensor:
        return linked.clamp(self._lowest, self._highest)

    def losses(self, linked: Tensor, labels: Tensor) -> Tensor:
        return (linked - labels).square()
