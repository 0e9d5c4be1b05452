"""Click-through rate: the probability of a click, by logistic loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.config import CtrConfig, ModelConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.splits import TRAIN
from torchrec_pt.distributed import raised_together
from torchrec_pt.tasks.pairs import PairTask, mean_over_ranks


class CtrTask(PairTask):
    """Labels are clicks (1) and impressions without one (0); predictions are probabilities."""

    name = "ctr"

    def __init__(self, config: CtrConfig, model: ModelConfig, dataset: PreparedDataset) -> None:
        super().__init__(config, model, dataset, click_labels(config, dataset))

    @property
    def information(self) -> float:
        """A label's variance, beside that of a fair coin: one of many impressions says little."""
        return 4 * self.mean * (1 - self.mean)

    def link(self, deviation: Tensor) -> Tensor:
        """The logit, where a deviation of the probability counts to first order around the mean."""
        base = math.log(self.mean / (1 - self.mean))
        return base + deviation / (self.mean * (1 - self.mean))

    def final(self, linked: Tensor) -> Tensor:
        return torch.sigmoid(linked)

    def losses(self, linked: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(linked, labels, reduction="none")


def click_labels(config: CtrConfig, dataset: PreparedDataset) -> Tensor:
    """(N,) float32, 0 or 1 for every interaction.

    Raises:
        ValueError: nothing to make labels of, labels other than 0 and 1, or one class in training.
    """
    if config.positive_rating is not None:
        if dataset.rating is None:
            raise ValueError(
                "finetune.ctr.positive_rating: needs ratings, "
                "data.columns.rating is not set; set it"
            )
        labels = (dataset.rating >= config.positive_rating).float()
    elif dataset.label is not None:
        labels = dataset.label
    else:
        raise ValueError(
            "finetune.ctr: needs labels; set data.columns.label, or positive_rating to make "
            "clicks of ratings"
        )
    odd = labels[(labels != 0) & (labels != 1)]
    with raised_together():
        if len(odd):
            raise ValueError(
                f"finetune.ctr: labels must be 0 or 1, found {odd[0]:g}; mend the column"
            )
    share = mean_over_ranks(labels[dataset.split == TRAIN])
    if share in (0.0, 1.0):
        raise ValueError(
            f"finetune.ctr: every training label is {share:g}, nothing can be learned from that; "
            "give impressions without a click too, or change positive_rating"
        )
    return labels
