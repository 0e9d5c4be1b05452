"""How well a stage does on the validation split, and which of its metrics decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks
from torchrec_pt.evaluate import held_out, predict_pairs, rank_targets
from torchrec_pt.learner import Learner
from torchrec_pt.metrics import (
    Estimate,
    click_metrics,
    ranking_metrics,
    rating_metrics,
)
from torchrec_pt.scoring import ModelScorer
from torchrec_pt.tasks.ctr import CtrTask
from torchrec_pt.tasks.pairs import Asked, PairTask, held_out_pairs
from torchrec_pt.tasks.rating import RatingTask
from torchrec_pt.train import Validate


def monitor_of(objectives: Sequence[nn.Module]) -> str:
    """The metric to choose by. Pretraining is judged by ranking the next item as it is."""
    if isinstance(objectives[0], CtrTask):
        return "logloss"
    return "rmse" if isinstance(objectives[0], RatingTask) else "ndcg@10"


def validation(
    config: RunConfig, dataset: PreparedDataset, learner: Learner, ranks: Ranks
) -> Validate:
    """Measures the learner as it stands, on every rank alike.

    Raises:
        ValueError: the split left nothing to validate on.
    """
    batch_size = config.evaluate.batch_size
    task = next(iter(learner.objectives.values()), None)
    if isinstance(task, PairTask):
        pairs = held_out_pairs(dataset, "valid")
        _require(len(pairs.users))

        def validate_pairs() -> dict[str, float]:
            predictions = predict_pairs(learner, task, pairs, ranks, batch_size)
            return _values(pair_metrics(task, pairs, predictions))

        return validate_pairs

    asked = held_out(dataset, "valid")
    _require(len(asked.users))
    history = dataset.history("train")

    def validate_ranking() -> dict[str, float]:
        scorer = ModelScorer(learner.backbone, history, ranks)
        found = rank_targets(scorer, asked, dataset.num_items, ranks, batch_size)
        return {n: float(v.mean()) for n, v in ranking_metrics(found, (10,)).items()}

    return validate_ranking


def pair_metrics(task: PairTask, asked: Asked, predictions: Tensor) -> dict[str, Estimate]:
    """The task's metrics of predictions (P,) of the asked targets."""
    targets = asked.targets
    _, user = torch.unique(asked.users[targets.rows], return_inverse=True)
    metrics = click_metrics if isinstance(task, CtrTask) else rating_metrics
    return metrics(predictions, task.labels[targets.values], user)


def _values(estimates: dict[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates.items()}


def _require(num_rows: int) -> None:
    if not num_rows:
        raise ValueError("data.split: no user has a validation interaction; change the split")
