"""The stages of a run, each a function of the configuration.

Every rank calls a stage; the first one writes. Preparation and training whose result is
there, made from the same configuration and inputs, are not done again.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from torchrec_pt.build import build_task
from torchrec_pt.candidates import read_candidates
from torchrec_pt.config import EvaluateConfig, RunConfig, ShowConfig, TaskConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import notices, require_rows
from torchrec_pt.data.prepare import is_prepared_from
from torchrec_pt.data.prepare import prepare as prepare_dataset
from torchrec_pt.distributed import joined_ranks, raised_together
from torchrec_pt.evaluation import TaskEvaluation, evaluate_pairs, evaluate_ranking
from torchrec_pt.export import export_embeddings
from torchrec_pt.external_ids import find_user
from torchrec_pt.files import whole_file, write_json
from torchrec_pt.held_out import held_out
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.recommender import Recommendation, Recommender
from torchrec_pt.runs import (
    TAKEN_OVER,
    StageResult,
    finished_stages,
    is_of_ranking,
    served_stage,
)
from torchrec_pt.stages import Stage, entered, train_stage
from torchrec_pt.train import OnValidation


def prepare(config: RunConfig, console: Console | None = None) -> PreparedDataset:
    """Raw logs to the prepared dataset, unless it is there.

    Raises:
        DataError: raw data that cannot be used.
    """
    with entered(config, console) as stage:
        with raised_together():
            if stage.ranks.is_first:
                prepare_dataset(config.data, config.prepared_dir, config.seed)
        with raised_together():
            dataset = PreparedDataset.load(config.prepared_dir, stage.ranks)
        if config.pretrain is not None or config.finetune.start_from is not None:
            require_rows(dataset.manifest, "validation")
        stage.say(
            f"prepare: {dataset.manifest.num_users:,} users, {dataset.num_items:,} items, "
            f"{dataset.manifest.num_interactions:,} interactions in {config.prepared_dir}"
        )
        for notice in notices(dataset.manifest):
            stage.say(f"prepare: {notice}")
        return dataset


def _load_prepared(stage: Stage) -> PreparedDataset:
    """What the prepare stage left, the parts of this rank.

    Raises:
        DataError: nothing, or the data of another configuration.
    """
    config = stage.config
    with raised_together():
        dataset = PreparedDataset.load(config.prepared_dir, stage.ranks)
    if not is_prepared_from(dataset.manifest, config.data, config.seed):
        raise DataError(
            f"{config.prepared_dir}: was prepared from another [data] section or seed; "
            "run the prepare stage first"
        )
    return dataset


def pretrain(
    config: RunConfig,
    console: Console | None = None,
    on_validation: OnValidation | None = None,
) -> StageResult:
    """Self-supervised pretraining; validated by ranking the next item without fine-tuning.

    Raises:
        ValueError: no [pretrain] section, or an objective that does not fit the model.
        TrainingError: the loss became NaN or infinite.
    """
    with entered(config, console, on_validation) as stage:
        dataset = _load_prepared(stage)
        objectives = build_objectives(config, dataset)
        assert config.pretrain is not None
        return train_stage(
            stage,
            dataset,
            name="pretrain",
            folder="pretrain",
            train=config.pretrain,
            objectives=objectives,
            start_from=None,
        )


def finetune(
    config: RunConfig,
    console: Console | None = None,
    on_validation: OnValidation | None = None,
    *,
    tasks: Collection[str] | None = None,
) -> dict[str, dict[str, StageResult]]:
    """Fine-tune for the configured tasks: task -> "pretrained", and "scratch" where asked for.

    Args:
        tasks: those of them to do now, in any order and on any number of processes; default: all.
            With none, `finetune.start_from` is taken over and no more.
    Raises:
        ValueError: no task configured, data that one cannot use, or nothing pretrained.
        TrainingError: the loss became NaN or infinite.
    """
    if not config.finetune.tasks:
        raise ValueError(
            "finetune: no task is configured; add [finetune.ctr], [finetune.ranking] or "
            "[finetune.rating]"
        )
    with entered(config, console, on_validation) as stage:
        dataset = _load_prepared(stage)
        if config.finetune.start_from is not None:
            _take_over(stage, dataset)
        pretrained = finished_stages(config, dataset).get("pretrain")
        if pretrained is None:
            raise ValueError(
                f"finetune: {config.run_dir / 'pretrain'} holds no finished pretraining of this "
                "configuration and data; run the pretrain stage first"
            )
        results: dict[str, dict[str, StageResult]] = {}
        for task, train in config.finetune.tasks.items():
            if tasks is not None and task not in tasks:
                continue
            arms: dict[str, tuple[TaskConfig, StageResult | None]] = {
                "pretrained": (train, pretrained)
            }
            if train.control == "scratch":
                arms["scratch"] = (train.as_control, None)
                if train.as_control != train:
                    stage.say(f"{task} (scratch): without {task}.transfer, all of it at one rate")
            results[task] = {
                arm: train_stage(
                    stage,
                    dataset,
                    name=f"{task} ({arm})",
                    folder=f"finetune/{task}/{arm}",
                    train=settings,
                    objectives=[build_task(config, task, dataset)],
                    start_from=start,
                )
                for arm, (settings, start) in arms.items()
            }
        return results


def _take_over(stage: Stage, dataset: PreparedDataset) -> StageResult:
    """The model of `finetune.start_from` over this catalogue, judged as one pretrained here is."""
    return train_stage(
        stage,
        dataset,
        name="start_from",
        folder="pretrain",
        train=TAKEN_OVER,
        objectives=[],
        start_from=None,
    )


# Task, or "sampled_ranking" -> what its models reached on the test split
Evaluation = dict[str, TaskEvaluation]


def evaluate(
    config: RunConfig, console: Console | None = None, *, tasks: Collection[str] | None = None
) -> Evaluation:
    """Test every model of the run. Ranking is always judged, of the pretrained model at least.

    Args:
        tasks: those of the configured ones to judge; default: all.
    Raises:
        ValueError: no test interactions.
    """
    with entered(config, console) as stage:
        dataset = _load_prepared(stage)
        evaluation: Evaluation = {}
        folder = config.run_dir / "evaluate"
        asked = [task for task in config.finetune.tasks if tasks is None or task in tasks]
        for task in dict.fromkeys(["ranking", *asked]):
            if task == "ranking":
                found = evaluate_ranking(stage, dataset)
            else:
                found = {task: evaluate_pairs(stage, dataset, task)}
            for name, (result, detail) in found.items():
                evaluation[name] = result
                with raised_together():
                    if stage.ranks.is_first:
                        with whole_file(folder / f"{name}.parquet") as partial:
                            detail().write_parquet(partial, use_pyarrow=True)
        with raised_together():
            if stage.ranks.is_first:
                write_json(folder / "result.json", {t: asdict(e) for t, e in evaluation.items()})
        return evaluation


def export_run(config: RunConfig, console: Console | None = None) -> list[Path]:
    """The embeddings that [export] names, of the served model, to <run_dir>/export."""
    with entered(config, console) as stage:
        paths: list[Path] = []
        for what in config.export.what:
            for format in config.export.formats:
                path = export_embeddings(config.run_dir, what, format=format)
                paths.append(path)
                stage.say(f"export: {what} in {path}")
        ranking = config.finetune.ranking
        if ranking is not None and ranking.head == "mlp":
            served = served_stage(config, _load_prepared(stage))
            if is_of_ranking(served):
                stage.say(
                    "export: the served model ranks by its mlp head, so inner products of these "
                    "vectors alone do not reproduce its ranking; ask Recommender for that"
                )
        return paths


def recommend(
    config: RunConfig, user: str | int | None, k: int
) -> tuple[str, list[Recommendation]]:
    """The user's external id (the first user's if None) and k recommendations."""
    with joined_ranks():
        recommender = Recommender.load(config.run_dir)
        known = str(user if user is not None else recommender.first_user)
        return known, recommender.recommend(known, k=k)


def report_run(config: RunConfig, console: Console | None = None) -> Path:
    """What the run has so far, as <run_dir>/report.html."""
    from torchrec_pt.report import write_report  # matplotlib takes its time

    with entered(config, console) as stage:
        path = config.run_dir / "report.html"
        with raised_together():
            if stage.ranks.is_first:
                stage.say(f"report: {write_report(config.run_dir)}")
        return path


@dataclass(frozen=True)
class RunResult:
    evaluation: Evaluation
    exported: list[Path]
    user: str
    recommendations: list[Recommendation]
    seconds: float


def run(config: RunConfig, console: Console | None = None) -> RunResult:
    """Every stage of the configuration, in order."""
    started_at = time.monotonic()
    with joined_ranks():
        check(config, prepare(config, console))
        if config.finetune.start_from is None:
            pretrain(config, console)
        if config.finetune.tasks or config.finetune.start_from is not None:
            finetune(config, console)
        evaluation = evaluate(config, console)
        exported = export_run(config, console)
        report_run(config, console)
        user, recommendations = recommend(config, config.show.user, config.show.k)
        dist.barrier()
    return RunResult(evaluation, exported, user, recommendations, time.monotonic() - started_at)


def check(config: RunConfig, dataset: PreparedDataset) -> None:
    """What the later stages of a run need of its data, before anything is trained.

    Raises:
        ValueError: they would fail.
    """
    require_rows(dataset.manifest, "test")
    _check_show(config.show, dataset)
    _check_candidates(config.evaluate, dataset)


def _check_show(show: ShowConfig, dataset: PreparedDataset) -> None:
    """What `run` shows at its end exists."""
    if show.user is not None:
        find_user(dataset, show.user)
    if show.title is not None and show.title not in dataset.items.columns:
        raise ValueError(f'show.title: no item feature "{show.title}"; declare it in data.features')


def _check_candidates(evaluate: EvaluateConfig, dataset: PreparedDataset) -> None:
    """The file of candidates can be used."""
    if evaluate.candidates is not None and evaluate.candidates.path is not None:
        with raised_together():
            read_candidates(evaluate.candidates.path, dataset, held_out(dataset, "test").users)
