"""The stages of a run, each a function of the configuration.

Every rank calls a stage; the first one writes. Preparation and training whose result is
there, made from the same configuration and inputs, are not done again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from torchrec_pt import baselines, export
from torchrec_pt.build import build_learner, build_objectives, load_backbone
from torchrec_pt.config import RunConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.data.prepare import prepare as prepare_dataset
from torchrec_pt.distributed import Ranks, gather_objects, joined_ranks
from torchrec_pt.evaluate import ModelScorer, Scorer, held_out, rank_targets
from torchrec_pt.files import write_json
from torchrec_pt.metrics import paired_difference, ranking_metrics
from torchrec_pt.optim import Optimizers
from torchrec_pt.recommender import Recommendation, Recommender
from torchrec_pt.runs import StageResult, load_result
from torchrec_pt.tasks.ranking import RankingTask
from torchrec_pt.train import MONITOR, Trainer
from torchrec_pt.transfer import load_pretrained


@dataclass(frozen=True)
class Stage:
    """What a stage works with: the run's settings, this process among its peers, and a screen.

    Attributes:
        console: None on every rank but the first.
    """

    config: RunConfig
    ranks: Ranks
    console: Console | None

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False)


@contextmanager
def _stage(config: RunConfig, console: Console | None) -> Iterator[Stage]:
    with joined_ranks() as ranks:
        if ranks.is_first:
            write_json(config.run_dir / "config.json", config.model_dump(mode="json"))
        yield Stage(config, ranks, console if ranks.is_first else None)


# --- prepare ------------------------------------------------------------------------------------


def prepare(config: RunConfig, console: Console | None = None) -> PreparedDataset:
    """Raw logs to the prepared dataset, unless it is there.

    Raises:
        DataError: raw data that cannot be used.
    """
    with _stage(config, console) as stage:
        failure: Exception | None = None
        if stage.ranks.is_first:
            try:
                prepare_dataset(config.data, config.prepared_dir, config.seed)
            except (ValueError, OSError) as error:
                failure = error
        # The others wait here, and end with the same words if the first one failed.
        failure = gather_objects(failure)[0]
        if failure is not None:
            raise failure
        dataset = PreparedDataset.load(config.prepared_dir)
        stage.say(
            f"prepare: {dataset.num_users:,} users, {dataset.num_items:,} items, "
            f"{len(dataset.interactions.values):,} interactions in {config.prepared_dir}"
        )
        return dataset


# --- training -----------------------------------------------------------------------------------


def pretrain(config: RunConfig, console: Console | None = None) -> StageResult:
    """Self-supervised pretraining; validated by ranking the next item without fine-tuning.

    Raises:
        ValueError: no [pretrain] section, or an objective that does not fit the model.
        TrainingError: the loss became NaN or infinite.
    """
    if config.pretrain is None:
        raise ValueError("pretrain: the configuration has no [pretrain] section; add one")
    with _stage(config, console) as stage:
        dataset = PreparedDataset.load(config.prepared_dir)
        objectives = build_objectives(config.pretrain, config.model, dataset)
        return _train(
            stage,
            dataset,
            name="pretrain",
            folder=config.run_dir / "pretrain",
            train=config.pretrain,
            objectives=objectives,
            start_from=None,
        )


def finetune(config: RunConfig, console: Console | None = None) -> dict[str, StageResult]:
    """Fine-tune for ranking: "pretrained", and "scratch" where the control is asked for.

    Raises:
        ValueError: no task configured, or nothing pretrained to start from.
        TrainingError: the loss became NaN or infinite.
    """
    ranking = config.finetune.ranking
    if ranking is None:
        raise ValueError("finetune: no task is configured; add [finetune.ranking]")
    with _stage(config, console) as stage:
        dataset = PreparedDataset.load(config.prepared_dir)
        pretrained = _finished(config, dataset, "pretrain")
        if pretrained is None:
            raise ValueError(
                f"finetune: {config.run_dir / 'pretrain'} holds no finished pretraining of this "
                "configuration and data; run the pretrain stage first"
            )
        arms: dict[str, StageResult | None] = {"pretrained": pretrained}
        if ranking.control == "scratch":
            arms["scratch"] = None
        return {
            arm: _train(
                stage,
                dataset,
                name=f"ranking ({arm})",
                folder=config.run_dir / "finetune/ranking" / arm,
                train=ranking,
                objectives=[RankingTask(ranking, config.model, dataset.num_items)],
                start_from=start,
            )
            for arm, start in arms.items()
        }


def _train(
    stage: Stage,
    dataset: PreparedDataset,
    *,
    name: str,
    folder: Path,
    train: TrainConfig,
    objectives: Sequence[nn.Module],
    start_from: StageResult | None,
) -> StageResult:
    """One training stage from its initial values, or from those of an earlier stage."""
    config, ranks = stage.config, stage.ranks
    start = start_from.fingerprint if start_from is not None else None
    fingerprint = _fingerprint(config, dataset, train, start)
    finished = load_result(folder)
    if finished is not None and finished.fingerprint == fingerprint:
        stage.say(f"{name}: done before; valid {MONITOR} {finished.metrics[MONITOR]:.4f}")
        return finished

    started_at = time.monotonic()
    built = build_learner(config, train, objectives, dataset.num_items, ranks)
    if start_from is not None:
        stage.say(f"{name}: {load_pretrained(start_from.checkpoint, built.model)}")
    history = dataset.history("train")
    loader = HistoryLoader(
        history,
        batch_size=train.batch_size,
        max_length=config.model.max_length,
        seed=config.seed,
        ranks=ranks,
    )
    optimizers = Optimizers(
        built.model, train, built.placement, train.epochs * loader.steps_per_epoch
    )
    trainer = Trainer(
        built.model,
        built.learner,
        optimizers,
        loader,
        train,
        name=name,
        folder=folder,
        fingerprint=fingerprint,
        ranks=ranks,
        console=stage.console,
    )
    asked = held_out(dataset, "valid")
    if not len(asked.users):
        raise ValueError(f"{name}: no user has a validation interaction; change data.split")

    def validate() -> dict[str, float]:
        scorer = ModelScorer(built.learner.backbone, history, ranks)
        found = rank_targets(scorer, asked, dataset.num_items, ranks, config.evaluate.batch_size)
        return {n: float(v.mean()) for n, v in ranking_metrics(found, (10,)).items()}

    position = trainer.run(validate)
    result = StageResult(
        folder,
        fingerprint,
        {
            "checkpoint": str(trainer.best_checkpoint.relative_to(folder)),
            "metrics": position.best["metrics"],
            "curve": position.curve,
            "seconds": time.monotonic() - started_at,
        },
    )
    return _saved_by_first(result, ranks)


# --- evaluate -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    metrics: one row a model: name -> metric -> mean over users.
    control: metric -> (pretrained − scratch, half-width of its 95 % interval).
    """

    metrics: dict[str, dict[str, float]]
    control: dict[str, tuple[float, float]]


def evaluate(config: RunConfig, console: Console | None = None) -> Evaluation:
    """Rank every test item over the full catalogue, by each trained model and each baseline."""
    with _stage(config, console) as stage:
        dataset = PreparedDataset.load(config.prepared_dir)
        asked = held_out(dataset, "test")
        if not len(asked.users):
            raise ValueError("evaluate: no user has a test interaction; change data.split")
        per_user: dict[str, dict[str, Tensor]] = {}
        for name, scorer in _scorers(stage, dataset):
            found = rank_targets(
                scorer, asked, dataset.num_items, stage.ranks, config.evaluate.batch_size
            )
            per_user[name] = ranking_metrics(found, config.evaluate.ks)
        metrics = {
            name: {metric: float(values.mean()) for metric, values in each.items()}
            for name, each in per_user.items()
        }
        control = {}
        if {"fine-tuned", "scratch"} <= per_user.keys():
            control = {
                metric: paired_difference(values, per_user["scratch"][metric])
                for metric, values in per_user["fine-tuned"].items()
            }
        if stage.ranks.is_first:
            folder = config.run_dir / "evaluate"
            write_json(folder / "result.json", {"metrics": metrics, "control": control})
            _write_per_user(folder / "users.parquet", dataset, asked.users, per_user)
        return Evaluation(metrics, control)


def _scorers(stage: Stage, dataset: PreparedDataset) -> Iterator[tuple[str, Scorer]]:
    config, ranks = stage.config, stage.ranks
    history = dataset.history("valid")
    if "popularity" in config.evaluate.baselines:
        yield "popularity", baselines.popularity(dataset.item_counts, ranks)
    if "item_knn" in config.evaluate.baselines:
        train = dataset.history("train")
        yield "item-kNN", baselines.item_knn(train, history, dataset.num_items, ranks)
    for name, folder in {
        "pretrained": "pretrain",
        "scratch": "finetune/ranking/scratch",
        "fine-tuned": "finetune/ranking/pretrained",
    }.items():
        result = _finished(config, dataset, folder)
        if result is not None:
            backbone = load_backbone(config, result.checkpoint, dataset.num_items, ranks)
            yield name, ModelScorer(backbone, history, ranks)


def _write_per_user(
    path: Path, dataset: PreparedDataset, users: Tensor, per_user: dict[str, dict[str, Tensor]]
) -> None:
    columns = {
        f"{name} {metric}": values.numpy()
        for name, each in per_user.items()
        for metric, values in each.items()
    }
    ids = dataset.users["external_id"][users.numpy()]
    pl.DataFrame({"user": ids, **columns}).write_parquet(path)


# --- export and show ----------------------------------------------------------------------------


def export_run(config: RunConfig, console: Console | None = None) -> dict[str, Path]:
    """Item and user embeddings of the served model to <run_dir>/export."""
    with _stage(config, console) as stage:
        recommender = Recommender.load(config.run_dir)
        dataset, backbone = recommender.dataset, recommender.backbone
        paths: dict[str, Path] = {}
        for what in config.export.what:
            path = config.run_dir / "export" / f"{what}.parquet"
            table = dataset.items if what == "items" else dataset.users
            blocks = (
                export.item_vectors(backbone, stage.ranks)
                if what == "items"
                else export.user_vectors(backbone, dataset, stage.ranks)
            )
            export.write_embeddings(path, table["external_id"], blocks, backbone.dim, stage.ranks)
            paths[what] = path
            stage.say(f"export: {table.height:,} × {backbone.dim} {what} in {path}")
        return paths


def recommend(
    config: RunConfig, user: str | int | None, k: int
) -> tuple[str, list[Recommendation]]:
    """The user's external id (the first user's if None) and k recommendations."""
    with joined_ranks():
        recommender = Recommender.load(config.run_dir)
        known = str(user if user is not None else recommender.dataset.users["external_id"][0])
        return known, recommender.recommend(known, k=k)


# --- all of it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunResult:
    evaluation: Evaluation
    exported: dict[str, Path]
    user: str
    recommendations: list[Recommendation]
    seconds: float


def run(config: RunConfig, console: Console | None = None) -> RunResult:
    """Every stage of the configuration, in order."""
    started_at = time.monotonic()
    with joined_ranks():
        prepare(config, console)
        pretrain(config, console)
        if config.finetune.ranking is not None:
            finetune(config, console)
        evaluation = evaluate(config, console)
        exported = export_run(config, console)
        user, recommendations = recommend(config, config.show.user, config.show.k)
        dist.barrier()
    return RunResult(evaluation, exported, user, recommendations, time.monotonic() - started_at)


def _fingerprint(
    config: RunConfig, dataset: PreparedDataset, train: TrainConfig, start: str | None
) -> str:
    """Names everything that a training stage's result depends on; `start`: where it starts from."""
    parts = (
        dataset.manifest.fingerprint,
        config.model.digest(),
        train.digest(),
        config.seed,
        start,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _finished(config: RunConfig, dataset: PreparedDataset, folder: str) -> StageResult | None:
    """The result of a training stage, if it was made from this configuration and data."""
    pretrain, ranking = config.pretrain, config.finetune.ranking
    expected = {}
    if pretrain is not None:
        expected["pretrain"] = _fingerprint(config, dataset, pretrain, None)
    if ranking is not None:
        start = expected.get("pretrain")
        expected["finetune/ranking/pretrained"] = _fingerprint(config, dataset, ranking, start)
        expected["finetune/ranking/scratch"] = _fingerprint(config, dataset, ranking, None)
    result = load_result(config.run_dir / folder)
    if result is None or result.fingerprint != expected.get(folder):
        return None
    return result


def _saved_by_first(result: StageResult, ranks: Ranks) -> StageResult:
    if ranks.is_first:
        result.save()
    dist.barrier()
    return result
