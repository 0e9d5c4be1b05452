"""How well a stage does on the validation split, and which of its metrics decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks
from torchrec_pt.held_out import gather_by_user, held_out, predict_pairs, rank_targets
from torchrec_pt.learner import Learner
from torchrec_pt.metrics import (
    Estimate,
    ReliabilityBin,
    click_metrics,
    ranking_metrics,
    rating_metrics,
    reliability,
)
from torchrec_pt.scoring import ModelScorer, head_of
from torchrec_pt.tasks.asked import Asked
from torchrec_pt.tasks.ctr import CtrTask
from torchrec_pt.tasks.pairs import PairTask
from torchrec_pt.tasks.rating import RatingTask
from torchrec_pt.train import Validate


def monitor_of(objectives: Sequence[nn.Module]) -> str:
    """The metric to choose by. Pretraining is judged by ranking the next item as it is."""
    task = next(iter(objectives), None)
    if isinstance(task, CtrTask):
        return "logloss"
    return "rmse" if isinstance(task, RatingTask) else "ndcg@10"


def validation(
    config: RunConfig, dataset: PreparedDataset, learner: Learner, ranks: Ranks
) -> Validate:
    """Measures the learner as it stands, on every rank alike.

    Raises:
        ValueError: the split left nothing to validate on.
    """
    if not dataset.manifest.num_taken_valid:
        raise ValueError("data.split: no user took an item in validation; change the split")
    batch_size = config.evaluate.batch_size
    task = next(iter(learner.objectives.values()), None)
    if isinstance(task, PairTask):
        pairs = task.held_out("valid")
        parts = dataset.part_of_user[pairs.users]

        def validate_pairs() -> dict[str, float]:
            predictions = predict_pairs(learner, task, pairs, parts, ranks, batch_size)
            judged = gather_judged(dataset, task, pairs, {"": predictions}, ranks)
            return _values(judged.metrics(task, ""))

        return validate_pairs

    asked = held_out(dataset, "valid")
    parts, users = dataset.part_of_user[asked.users], dataset.user_ids[asked.users]
    history = dataset.history("train")

    def validate_ranking() -> dict[str, float]:
        scorer = ModelScorer(learner.backbone, history, ranks, head_of(learner))
        found = rank_targets(scorer, asked, parts, dataset.num_items, ranks, batch_size)
        _, (found,) = gather_by_user(users, [found], ranks)
        return {n: float(v.mean()) for n, v in ranking_metrics(found, (10,)).items()}

    return validate_ranking


@dataclass(frozen=True)
class Judged:
    """Held-out interactions (P,) of all ranks, by dense user id.

    Attributes:
        users, items: (P,) int64 dense ids.
        labels: (P,) float32.
        predictions: model -> (P,) float32.
    """

    users: Tensor
    items: Tensor
    labels: Tensor
    predictions: dict[str, Tensor]

    def metrics(self, task: PairTask, model: str) -> dict[str, Estimate]:
        """The task's metrics of a model's predictions."""
        metrics = click_metrics if isinstance(task, CtrTask) else rating_metrics
        return metrics(self.predictions[model], self.labels, self._user)

    def reliability(self, model: str) -> list[ReliabilityBin]:
        """Of a model's predictions, where labels are clicks."""
        return reliability(self.predictions[model], self.labels, self._user)

    @property
    def _user(self) -> Tensor:
        """(P,) int64: users without gaps."""
        return torch.unique(self.users, return_inverse=True)[1]


def gather_judged(
    dataset: PreparedDataset,
    task: PairTask,
    asked: Asked,
    predictions: Mapping[str, Tensor],
    ranks: Ranks,
) -> Judged:
    """Of the asked targets of every rank; `predictions`: model -> (P,) of this rank's."""
    labels = task.labels_of(asked.interactions)
    columns = [asked.targets.values, labels, *predictions.values()]
    users = dataset.user_ids[asked.users[asked.targets.rows]]
    one_each = torch.arange(len(labels) + 1)
    everyone, gathered = gather_by_user(users, [Jagged(c, one_each) for c in columns], ranks)
    items, labels, *found = (column.values for column in gathered)
    return Judged(everyone, items, labels, dict(zip(predictions, found, strict=True)))


def _values(estimates: dict[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates.items()}
