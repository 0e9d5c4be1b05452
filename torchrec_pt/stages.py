"""One training stage: built, trained and recorded, unless that was done before."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn

from torchrec_pt.build import Built, build_learner
from torchrec_pt.config import PretrainConfig, RunConfig, TaskConfig, TrainConfig, transfer_of
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, joined_ranks, raised_together
from torchrec_pt.files import write_json
from torchrec_pt.layer_rates import layer_rates
from torchrec_pt.optim import Optimizers
from torchrec_pt.plan import is_worth_showing, render_plan, table_plans, write_plan
from torchrec_pt.runs import (
    StageResult,
    load_result,
    origin,
    origin_digest,
    stage_fingerprint,
)
from torchrec_pt.tasks.pairs import PairTask
from torchrec_pt.train import OnValidation, Trainer
from torchrec_pt.transfer import (
    Numbering,
    TransferReport,
    continue_training,
    load_pretrained,
)
from torchrec_pt.transfer_table import moved_parts, render_moved
from torchrec_pt.validation import monitor_of, validation


@dataclass(frozen=True)
class Stage:
    """What a stage works with: the run's settings, this process among its peers, and a screen.

    Attributes:
        console: None on every rank but the first.
    """

    config: RunConfig
    ranks: Ranks
    console: Console | None
    on_validation: OnValidation | None = None

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False)


@contextmanager
def entered(
    config: RunConfig, console: Console | None, on_validation: OnValidation | None = None
) -> Iterator[Stage]:
    """Join the ranks and leave the resolved configuration in the run's folder."""
    with joined_ranks() as ranks:
        with raised_together():
            if ranks.is_first:
                _leave_config(config)
        yield Stage(config, ranks, console if ranks.is_first else None, on_validation)


def _leave_config(config: RunConfig) -> None:
    """Stages that run side by side find what the first of them left, and do not write at once."""
    path, resolved = config.run_dir / "config.json", config.model_dump(mode="json")
    with suppress(OSError, ValueError):
        if json.loads(path.read_text()) == resolved:
            return
    write_json(path, resolved)


def train_stage(
    stage: Stage,
    dataset: PreparedDataset,
    *,
    name: str,
    folder: str,
    train: TrainConfig,
    objectives: Sequence[nn.Module],
    start_from: StageResult | None,
) -> StageResult:
    """Train from the initial values, an earlier stage's, or those of another run (`origin`).

    Args:
        folder: inside the run's.
    Raises:
        TrainingError: the loss became NaN or infinite.
        ValueError: nothing to validate on, or nothing in common with where it starts.
    """
    config, ranks = stage.config, stage.ranks
    start = start_from.fingerprint if start_from is not None else None
    fingerprint = stage_fingerprint(config, dataset, train, start)
    monitor = monitor_of(objectives)
    path = config.run_dir / folder
    finished = load_result(path)
    if finished is not None and finished.fingerprint == fingerprint:
        best = finished.metrics[monitor]
        stage.say(f"{name}: done before; valid {monitor} {best:.4f}")
        return finished

    started_at = time.monotonic()
    built = build_learner(config, train, objectives, dataset, ranks)
    numbering = Numbering.of(dataset)
    loader = HistoryLoader(
        dataset,
        batch_size=train.batch_size,
        max_length=config.model.max_length,
        seed=config.seed,
        ranks=ranks,
        with_impressions=any(isinstance(one, PairTask) for one in objectives),
    )
    steps_per_epoch = train.steps_in(loader.steps_per_epoch)
    layers = layer_rates(
        built.learner, built.model.state_dict(), transfer_of(train), steps_per_epoch
    )
    num_steps = train.epochs * steps_per_epoch
    optimizers = Optimizers(built.model, train, built.placement, num_steps, layers)
    plans = table_plans(built.model, optimizers.state())
    with raised_together():
        if stage.console is not None and is_worth_showing(plans):
            stage.console.print(render_plan(plans))
        if ranks.is_first:
            write_plan(path / "plan.json", plans)
    started = _start(stage, name, train, start_from, built, optimizers, numbering)
    trainer = Trainer(
        built.model,
        built.learner,
        optimizers,
        loader,
        train,
        name=name,
        monitor=monitor,
        folder=path,
        fingerprint=fingerprint,
        numbering=numbering,
        ranks=ranks,
        console=stage.console,
        on_validation=stage.on_validation,
    )
    position = trainer.run(validation(config, dataset, built.learner, ranks))
    result = StageResult(
        path,
        fingerprint,
        {
            "checkpoint": str(trainer.best_checkpoint.relative_to(path)),
            "monitor": monitor,
            "metrics": trainer.best["metrics"],
            "curve": position.curve,
            **started,
            "seconds": time.monotonic() - started_at,
        },
    )
    with raised_together():
        if ranks.is_first:
            result.save()
    return result


def _start(
    stage: Stage,
    name: str,
    train: TrainConfig,
    start_from: StageResult | None,
    built: Built,
    optimizers: Optimizers,
    numbering: Numbering,
) -> dict[str, Any]:
    """Take over what the stage starts from, and say what that was, here and for result.json."""
    model, ranks = built.model, stage.ranks
    if start_from is not None:
        report = load_pretrained(start_from.checkpoint, model, numbering, ranks)
        return {"transfer": _said(stage, name, report, built, optimizers)}
    source = None if isinstance(train, TaskConfig) else origin(stage.config)
    if source is None:
        return {"transfer": {}}
    digest = {"origin": origin_digest(stage.config)}
    if isinstance(train, PretrainConfig):
        report = continue_training(source, model, optimizers, numbering, ranks)
        stage.say(f"{name}: continues from {source}: {report}")
        return {"transfer": report.values(), **digest}
    stage.say(f"{name}: {source}")
    report = load_pretrained(source, model, numbering, ranks)
    return {"transfer": _said(stage, name, report, built, None), **digest}


def _said(
    stage: Stage, name: str, report: TransferReport, built: Built, optimizers: Optimizers | None
) -> dict[str, Any]:
    """Show what moved, part by part; `optimizers` where the stage trains."""
    rates, layers = ({}, {}) if optimizers is None else (optimizers.rates, optimizers.layers)
    parts = moved_parts(report, built.learner.backbone, rates, layers)
    if stage.console is not None:
        stage.console.print(render_moved(parts, f"{name}: what moved"))
    return {**report.values(), "parts": [part.values() for part in parts]}
