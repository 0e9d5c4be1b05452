"""Test metrics of every model of a run, task by task, and what pretraining gave each task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl
from torch import Tensor

from torchrec_pt.baselines import ItemKnn, Popularity
from torchrec_pt.build import build_task, load_learner
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.manifest import Manifest
from torchrec_pt.evaluate import gather_by_user, held_out, predict_pairs, rank_targets
from torchrec_pt.metrics import Estimate, mean_estimate, paired_difference, ranking_metrics
from torchrec_pt.runs import finished_stages
from torchrec_pt.scoring import ModelScorer, Scorer
from torchrec_pt.stages import Stage
from torchrec_pt.tasks.pairs import PairTask, held_out_pairs
from torchrec_pt.validation import gather_judged

# Makes the table with one row a user (ranking) or a test interaction (ctr, rating), which is for
# one rank to write
Detail = Callable[[], pl.DataFrame]


@dataclass(frozen=True)
class TaskEvaluation:
    """Attributes:
    metrics: one row a model: name -> metric -> value on the test split.
    control: metric -> (fine-tuned − scratch, half-width of its 95 % interval, paired over
        users); empty without a control.
    """

    metrics: dict[str, dict[str, float]]
    control: dict[str, tuple[float, float]]


def evaluate_ranking(stage: Stage, dataset: PreparedDataset) -> tuple[TaskEvaluation, Detail]:
    """Rank every test item over the full catalogue, by each trained model and each baseline.

    Raises:
        ValueError: no test interactions.
    """
    _require(dataset.manifest)
    asked = held_out(dataset, "test")
    parts, users = dataset.part_of_user[asked.users], dataset.user_ids[asked.users]
    batch_size = stage.config.evaluate.batch_size
    per_user: dict[str, dict[str, Tensor]] = {}
    for name, scorer in _scorers(stage, dataset):
        found = rank_targets(scorer, asked, parts, dataset.num_items, stage.ranks, batch_size)
        everyone, (found,) = gather_by_user(users, [found], stage.ranks)
        per_user[name] = ranking_metrics(found, stage.config.evaluate.ks)
    columns = {
        f"{name} {metric}": values.numpy()
        for name, each in per_user.items()
        for metric, values in each.items()
    }
    estimates = {
        name: {metric: mean_estimate(values) for metric, values in each.items()}
        for name, each in per_user.items()
    }

    def detail() -> pl.DataFrame:
        return pl.DataFrame({"user": dataset.external_user_ids()[everyone.numpy()], **columns})

    return _summary(estimates), detail


def _scorers(stage: Stage, dataset: PreparedDataset) -> Iterator[tuple[str, Scorer[Any]]]:
    config, ranks = stage.config, stage.ranks
    history = dataset.history("valid")
    if "popularity" in config.evaluate.baselines:
        yield "popularity", Popularity(dataset.item_counts)
    if "item_knn" in config.evaluate.baselines:
        yield "item-kNN", ItemKnn(dataset.history("train"), history, dataset.num_items)
    finished = finished_stages(config, dataset)
    for name, folder in {"pretrained": "pretrain", **_arms("ranking")}.items():
        if folder in finished:
            learner = load_learner(config, finished[folder].checkpoint, dataset, ranks)
            yield name, ModelScorer(learner.backbone, history, ranks)


def evaluate_pairs(
    stage: Stage, dataset: PreparedDataset, name: str
) -> tuple[TaskEvaluation, Detail]:
    """Predict the label of every test interaction, by each trained model and the biases.

    Raises:
        ValueError: no test interactions, or labels that the task cannot use.
    """
    _require(dataset.manifest)
    config, ranks = stage.config, stage.ranks
    asked = held_out_pairs(dataset, "test")
    parts = dataset.part_of_user[asked.users]
    task = build_task(config, name, dataset)
    assert isinstance(task, PairTask)
    predictions: dict[str, Tensor] = {}
    if "biases" in config.evaluate.baselines:
        predictions["biases"] = task.predict_by_biases(asked)
    finished = finished_stages(config, dataset)
    for arm, folder in _arms(name).items():
        if folder in finished:
            task = build_task(config, name, dataset)
            assert isinstance(task, PairTask)
            path = finished[folder].checkpoint
            learner = load_learner(config, path, dataset, ranks, [task])
            predictions[arm] = predict_pairs(
                learner, task, asked, parts, ranks, config.evaluate.batch_size
            )
    judged = gather_judged(dataset, task, asked, predictions, ranks)
    estimates = {model: judged.metrics(task, model) for model in predictions}

    def detail() -> pl.DataFrame:
        return pl.DataFrame(
            {
                "user": dataset.external_user_ids()[judged.users.numpy()],
                "item": dataset.items["external_id"][judged.items.numpy()],
                "label": judged.labels.numpy(),
                **{model: found.numpy() for model, found in judged.predictions.items()},
            }
        )

    return _summary(estimates), detail


def _arms(task: str) -> dict[str, str]:
    """Model name -> folder of its training, the control first."""
    return {
        "scratch": f"finetune/{task}/scratch",
        "fine-tuned": f"finetune/{task}/pretrained",
    }


def _summary(estimates: dict[str, dict[str, Estimate]]) -> TaskEvaluation:
    control = {}
    if {"fine-tuned", "scratch"} <= estimates.keys():
        control = {
            metric: paired_difference(estimate, estimates["scratch"][metric])
            for metric, estimate in estimates["fine-tuned"].items()
        }
    metrics = {
        model: {metric: estimate.value for metric, estimate in each.items()}
        for model, each in estimates.items()
    }
    return TaskEvaluation(metrics, control)


def _require(manifest: Manifest) -> None:
    if not manifest.num_test:
        raise ValueError("data.split: no user has a test interaction; change the split")
