"""Rating: the number of stars that a user gives an item, by squared error."""

from __future__ import annotations

from torch import Tensor

from torchrec_pt.config import ModelConfig, RatingConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.splits import TRAIN
from torchrec_pt.distributed import gather_objects
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

    def losses(self, linked: Tensor, labels: Tensor) -> Tensor:
        return (linked - labels).square()


def _extremes(ratings: Tensor) -> tuple[float, float] | None:
    return (float(ratings.min()), float(ratings.max())) if len(ratings) else None
