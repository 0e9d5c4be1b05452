"""What others learn of a stage while it runs: Ray Train, the log, the storage, the screen.

`Observer` is told by the library, on every rank; `Watch` by Ray Train's controller, which sees
workers come and go. The library resumes from its own checkpoints, so what Ray is given of them
is a report: the best one, and the newest.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
from pyarrow import fs
from ray.train import UserCallback

from cluster.logs import DRIVER, Log
from cluster.screen import Lines, failures
from cluster.stages import EVALUATE, FINETUNE
from cluster.work import StageWork
from torchrec_pt.files import link_files

if TYPE_CHECKING:
    from torchrec_pt.pipeline import Evaluation, RunResult
    from torchrec_pt.train import Validated

# What Ray Train's checkpoints are compared by: the monitored metric, turned so that larger is
# better. The control of a fine-tuning task has metrics and no checkpoint to be compared.
SCORE = "score"
# Ray's controller takes a report a look, and a storage may be far; a validation may take no time.
BETWEEN_REPORTS_S = 10.0


class Observer:
    """The library's `on_validation` on one rank."""

    def __init__(self, given: StageWork, log: Log, console: Lines | None) -> None:
        self._given = given
        self._log = log
        self._console = console
        self._reported_at = -math.inf

    def __call__(self, told: Validated) -> None:
        from torchrec_pt.distributed import raised_together

        entry = told.curve[-1]
        with raised_together():
            self._log.write(
                "validated",
                step=entry["step"],
                training=told.name,
                epoch=entry["epoch"],
                losses=entry["losses"],
                metrics=entry["metrics"],
            )
        if not self._is_due():
            return
        is_control = told.checkpoint.parent.parent.name == "scratch"
        self._report(reported(told.monitor, entry), None if is_control else told.checkpoint)
        with raised_together():
            if self._log.rank == 0:
                self._given.leave()
        if self._console is not None and entry["step"]:
            value = entry["metrics"][told.monitor]
            self._console.print(
                f"{told.name}: epoch {entry['epoch']}, valid {told.monitor} {value:.4f}",
                highlight=False,
            )

    def report_end(self, result: RunResult | None) -> None:
        """What the stage came to; all ranks call it."""
        stage, run_dir = self._given.stage, self._given.work.config.run_dir
        if stage.kind == EVALUATE:
            assert result is not None
            self._report(flat_metrics(result.evaluation), None)
            return
        from torchrec_pt.checkpoint import folder_of_step
        from torchrec_pt.runs import load_result

        folder = f"finetune/{stage.task}/pretrained" if stage.kind == FINETUNE else "pretrain"
        ended = load_result(run_dir / folder)
        assert ended is not None
        monitor, curve = ended.values["monitor"], ended.values["curve"]
        best = next(
            e for e in curve if folder_of_step(Path(), e["step"]).name == ended.checkpoint.name
        )
        self._report(reported(monitor, best), ended.checkpoint)

    def _is_due(self) -> bool:
        """The first rank's clock decides for all."""
        from torchrec_pt.distributed import gather_objects

        now = time.monotonic()
        (is_due, *_) = gather_objects(now - self._reported_at >= BETWEEN_REPORTS_S)
        if is_due:
            self._reported_at = now
        return bool(is_due)

    def _report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """All ranks call it; the first one's word counts.

        Nothing is copied where Ray's folder and the checkpoint are on one disk.
        """
        from torchrec_pt.distributed import raised_together

        storage = ray.train.get_context().get_storage()
        is_local = isinstance(storage.storage_filesystem, fs.LocalFileSystem)
        mode = ray.train.CheckpointUploadMode
        shown = None
        with raised_together():
            if self._log.rank == 0 and checkpoint is not None and checkpoint.is_dir():
                if is_local:
                    place = Path(storage.experiment_fs_path) / f"checkpoint-{uuid.uuid4().hex}"
                    link_files(checkpoint, place)
                    shown = ray.train.Checkpoint(str(place), storage.storage_filesystem)
                else:
                    shown = ray.train.Checkpoint.from_directory(checkpoint.absolute())
        ray.train.report(
            dict(metrics),
            checkpoint=shown,
            checkpoint_upload_mode=mode.NO_UPLOAD if is_local else mode.SYNC,
        )


def reported(monitor: str, entry: Mapping[str, Any]) -> dict[str, float]:
    """An entry of the library's curve as Ray Train's metrics."""
    from torchrec_pt.metrics import goodness

    score = goodness(monitor, entry["metrics"][monitor])
    return {
        SCORE: -math.inf if math.isnan(score) else score,
        "epoch": entry["epoch"],
        "step": entry["step"],
        **{f"loss/{name}": value for name, value in entry["losses"].items()},
        **{f"valid/{name}": value for name, value in entry["metrics"].items()},
    }


def flat_metrics(evaluation: Evaluation) -> dict[str, float]:
    """task/model/metric -> value, as Ray Train reports metrics."""
    return {
        f"{task}/{model}/{metric}": value
        for task, result in evaluation.items()
        for model, metrics in result.metrics.items()
        for metric, value in metrics.items()
    }


class Watch(UserCallback):
    """One line, on the screen and in the log, for each time that workers are lost."""

    def __init__(self, given: StageWork, max_failures: int) -> None:
        self._given = given
        self._max_failures = max_failures
        self._num_failures = 0
        self._num_workers: int | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        self._num_workers = len(metrics)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._num_failures += 1
        asked = run_context.scaling_config.num_workers
        num_workers = asked if isinstance(asked, int) else self._num_workers
        lost, why = causes(worker_exceptions), failures(causes(worker_exceptions))
        goes_on = self._num_failures <= self._max_failures
        stage = self._given.stage.name
        with contextlib.suppress(OSError):  # a full disk is the workers' to report
            self._given.log(DRIVER).write(
                "lost workers",
                lost=sorted(lost),
                why=why,
                num_workers=num_workers,
                restarts=self._num_failures if goes_on else self._num_failures - 1,
            )
        of = f"{len(lost)} of {num_workers} workers" if num_workers else f"workers: {len(lost)}"
        then = (
            "going on from the last checkpoint "
            f"(restart {self._num_failures} of {self._max_failures})"
            if goes_on
            else f"given up after {self._max_failures} restarts"
        )
        self._given.work.screen.say(f"{stage}: lost {of} ({why}); {then}")


def causes(by_rank: Mapping[int, Exception]) -> dict[int, Exception]:
    """Without the workers that only lost another one."""
    first = {r: e for r, e in by_rank.items() if type(e).__name__ != "LostWorkerError"}
    return first or dict(by_rank)
