"""Test metrics of every model of a run, task by task, and what pretraining gave each task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl
import torch
from torch import Tensor

from torchrec_pt.baselines import ItemKnn, Popularity
from torchrec_pt.build import build_task, load_learner
from torchrec_pt.candidates import load_candidates
from torchrec_pt.config import Candidates
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.manifest import Manifest
from torchrec_pt.distributed import sum_over_ranks
from torchrec_pt.held_out import (
    gather_by_user,
    held_out,
    predict_pairs,
    rank_and_list,
)
from torchrec_pt.metrics import (
    Estimate,
    ReliabilityBin,
    compared,
    mean_estimate,
    novelty,
    offered,
    paired_difference,
    ranking_metrics,
    sampled_ranking_metrics,
)
from torchrec_pt.runs import finished_stages
from torchrec_pt.scoring import ModelScorer, Scorer, head_of
from torchrec_pt.stages import Stage
from torchrec_pt.tasks.ctr import CtrTask
from torchrec_pt.tasks.pairs import PairTask
from torchrec_pt.validation import gather_judged

# Makes the table with one row a user (ranking) or a test interaction (ctr, rating), which is for
# one rank to write
Detail = Callable[[], pl.DataFrame]


@dataclass(frozen=True)
class TaskEvaluation:
    """Attributes:
    metrics: one row a model: name -> metric -> value on the test split.
    control: metric -> (fine-tuned − scratch, half-width of its 95 % interval, paired over
        users), of calibration the difference of its distances |log| from 1; empty without a
        control. Coverage, which belongs to no user, has none.
    protocol: of rankings, what a test item is ranked against.
    reliability: of clicks, model -> bins.
    """

    metrics: dict[str, dict[str, float]]
    control: dict[str, tuple[float, float]]
    protocol: str = ""
    reliability: dict[str, list[ReliabilityBin]] = field(default_factory=dict)


def evaluate_ranking(
    stage: Stage, dataset: PreparedDataset
) -> dict[str, tuple[TaskEvaluation, Detail]]:
    """Rank every test item, by each trained model and each baseline.

    Returns:
        "ranking", over the full catalogue; with `evaluate.candidates` "sampled_ranking" besides,
        each test item among its candidates.
    Raises:
        ValueError: no test interactions, or candidates that cannot be read.
    """
    _require(dataset.manifest)
    asked = held_out(dataset, "test")
    parts, users = dataset.part_of_user[asked.users], dataset.user_ids[asked.users]
    config = stage.config.evaluate
    block = (parts, dataset.num_items, stage.ranks, config.batch_size)
    candidates = None
    protocols = {"ranking": "each test item among all items that its user did not take before"}
    if config.candidates is not None:
        candidates, notice = load_candidates(config.candidates, dataset, asked, stage.ranks)
        protocols["sampled_ranking"] = _protocol(config.candidates)
        if notice is not None:
            stage.say(f"evaluate: {notice}")
    per_user: dict[str, dict[str, dict[str, Tensor]]] = {task: {} for task in protocols}
    coverage: dict[str, dict[str, float]] = {}
    longest = max(config.ks)
    for name, scorer in _scorers(stage, dataset):
        found = rank_and_list(scorer, asked, *block, candidates=candidates, k=longest)
        coverage[name] = _coverage(found.lists, dataset.num_items, config.ks)
        of_lists = novelty(found.lists, dataset.item_counts, config.ks)
        own = Jagged(torch.stack([*of_lists.values()], dim=1), torch.arange(len(users) + 1))
        everyone, (over_all, among, novelties) = gather_by_user(
            users, [found.ranks, found.among, own], stage.ranks
        )
        per_user["ranking"][name] = {
            **ranking_metrics(over_all, config.ks),
            **dict(zip(of_lists, novelties.values.unbind(1), strict=True)),
        }
        if candidates is not None:
            per_user["sampled_ranking"][name] = sampled_ranking_metrics(among, config.ks)

    def detail(task: str) -> pl.DataFrame:
        columns = {
            f"{name} {metric}": values.numpy()
            for name, each in per_user[task].items()
            for metric, values in each.items()
        }
        return pl.DataFrame({"user": dataset.external_user_ids()[everyone.numpy()], **columns})

    results = {task: _of_users(per_user[task], protocol) for task, protocol in protocols.items()}
    whole = results["ranking"]
    covered = {name: {**each, **coverage[name]} for name, each in whole.metrics.items()}
    results["ranking"] = replace(whole, metrics=covered)
    return {task: (result, functools.partial(detail, task)) for task, result in results.items()}


def _coverage(lists: Jagged, num_items: int, ks: Sequence[int]) -> dict[str, float]:
    """ "coverage@k": the share of the catalogue that the lists (of all ranks) offer to anybody."""
    shares = {}
    for k in ks:
        num_lists = sum_over_ranks(offered(lists, num_items, k).long())
        shares[f"coverage@{k}"] = float((num_lists > 0).double().mean())
    return shares


def _protocol(candidates: Candidates) -> str:
    if candidates.path is not None:
        return f"each test item among its user's candidates in {candidates.path}"
    return f"each test item among {candidates.num} drawn ones that its user never took"


def _of_users(per_user: dict[str, dict[str, Tensor]], protocol: str) -> TaskEvaluation:
    """Means of metrics: model -> metric -> (num_users,)."""
    estimates = {
        name: {metric: mean_estimate(values) for metric, values in each.items()}
        for name, each in per_user.items()
    }
    return _summary(estimates, protocol)


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
            objectives = [] if folder == "pretrain" else [build_task(config, "ranking", dataset)]
            learner = load_learner(config, finished[folder].checkpoint, dataset, ranks, objectives)
            yield name, ModelScorer(learner.backbone, history, ranks, head_of(learner))


def evaluate_pairs(
    stage: Stage, dataset: PreparedDataset, name: str
) -> tuple[TaskEvaluation, Detail]:
    """Predict the label of every test interaction, by each trained model and the biases.

    Raises:
        ValueError: no test interactions, or labels that the task cannot use.
    """
    _require(dataset.manifest)
    config, ranks = stage.config, stage.ranks
    task = build_task(config, name, dataset)
    assert isinstance(task, PairTask)
    asked = task.held_out("test")
    parts = dataset.part_of_user[asked.users]
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
    result = _summary({model: judged.metrics(task, model) for model in predictions})
    if isinstance(task, CtrTask):
        bins = {model: judged.reliability(model) for model in predictions}
        result = replace(result, reliability=bins)

    def detail() -> pl.DataFrame:
        return pl.DataFrame(
            {
                "user": dataset.external_user_ids()[judged.users.numpy()],
                "item": dataset.items["external_id"][judged.items.numpy()],
                "label": judged.labels.numpy(),
                **{model: found.numpy() for model, found in judged.predictions.items()},
            }
        )

    return result, detail


def _arms(task: str) -> dict[str, str]:
    """Model name -> folder of its training, the control first."""
    return {
        "scratch": f"finetune/{task}/scratch",
        "fine-tuned": f"finetune/{task}/pretrained",
    }


def _summary(estimates: dict[str, dict[str, Estimate]], protocol: str = "") -> TaskEvaluation:
    control = {}
    if {"fine-tuned", "scratch"} <= estimates.keys():
        control = {
            metric: paired_difference(
                compared(metric, estimate), compared(metric, estimates["scratch"][metric])
            )
            for metric, estimate in estimates["fine-tuned"].items()
        }
    metrics = {
        model: {metric: estimate.value for metric, estimate in each.items()}
        for model, each in estimates.items()
    }
    return TaskEvaluation(metrics, control, protocol)


def _require(manifest: Manifest) -> None:
    if not manifest.num_taken_test:
        raise ValueError("data.split: no user took an item in test; change the split")
