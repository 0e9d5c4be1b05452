"""The training loop that pretraining and fine-tuning share."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from torchrec_pt import checkpoint
from torchrec_pt.averaging import AveragedWeights
from torchrec_pt.checkpoint import Checkpoint, CheckpointError
from torchrec_pt.config import TrainConfig
from torchrec_pt.data.batch import Batch, Rows
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, gather_objects, raised_together
from torchrec_pt.events import EventFile
from torchrec_pt.learner import Learner, StepLoss
from torchrec_pt.metrics import goodness
from torchrec_pt.optim import Optimizers
from torchrec_pt.progress import StageProgress
from torchrec_pt.saver import Saver
from torchrec_pt.train_pipeline import SparseDistPipeline, TakenStep, suits_pipeline
from torchrec_pt.transfer import Numbering, model_tensors, optimizer_tensors

# Metrics on the validation split
Validate = Callable[[], dict[str, float]]


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""


@dataclass
class Position:
    """How far a stage has come; saved with every checkpoint.

    Attributes:
        epoch: epochs done.
        step: steps done in all, each an update by `accumulate_steps` batches.
        epoch_step: steps done in the epoch that has begun.
        loss_sums: each objective's losses over those, summed in float32; empty before the first.
        curve: one entry per validation: epoch, step, mean losses of the last epoch, metrics.
    """

    epoch: int = 0
    step: int = 0
    epoch_step: int = 0
    loss_sums: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Validated:
    """A validation whose checkpoint is on disk.

    Attributes:
        name: the stage's.
        monitor: the metric that decides.
        curve: one entry per validation so far, as `Position` has it.
        checkpoint: of this validation.
    """

    name: str
    monitor: str
    curve: Sequence[dict[str, Any]]
    checkpoint: Path


# Told on every rank, at the same place
OnValidation = Callable[[Validated], None]


class Trainer:
    """One stage: a sharded learner, its optimizers, and the folder it leaves behind.

    Args:
        learner: the module inside `model`.
        monitor: the validation metric that chooses the best checkpoint.
        fingerprint: names the configuration and inputs; a checkpoint of another one is not resumed.
        numbering: of the tables' rows; every checkpoint holds it.
        on_validation: shows progress in the place of the console's lines between validations.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        learner: Learner,
        optimizers: Optimizers,
        loader: HistoryLoader,
        config: TrainConfig,
        *,
        name: str,
        monitor: str,
        folder: Path,
        fingerprint: str,
        numbering: Numbering,
        ranks: Ranks,
        console: Console | None,
        on_validation: OnValidation | None = None,
    ) -> None:
        self.model = model
        self.learner = learner
        self.optimizers = optimizers
        self.loader = loader
        self.config = config
        self.name = name
        self.monitor = monitor
        self.folder = folder
        self.fingerprint = fingerprint
        self.numbering = numbering
        self.ranks = ranks
        self.console = console
        self.on_validation = on_validation
        self.position = Position()
        self._averaged: AveragedWeights | None = None
        if config.average_decay is not None:
            self._averaged = AveragedWeights(optimizers.parameters, config.average_decay)
        self._saver = Saver(
            self._checkpoints,
            numbering.items,
            ranks,
            keep_last=config.keep_checkpoints,
            in_background=config.async_checkpoints,
            vocabulary=numbering.vocabulary,
        )
        self.pipeline: SparseDistPipeline | None = None
        if suits_pipeline(learner, ranks.device):
            self.pipeline = SparseDistPipeline(
                model, learner, optimizers, ranks.device, self._prepared_forward
            )

    def run(self, validate: Validate) -> Position:
        """Train to the end or until patience runs out; `best_checkpoint` then holds the result.

        Raises:
            TrainingError: the loss became NaN or infinite.
            CheckpointError: a checkpoint that could not be written.
        """
        writer = EventFile(self.folder / "tensorboard") if self.ranks.is_first else None
        with self._saver:
            if not self._resume():
                self._validate_and_save(validate, {}, writer)
            self._train(validate, writer)
        return self.position

    def _train(self, validate: Validate, writer: EventFile | None) -> None:
        num_steps = self.optimizers.num_steps
        start, with_lines = self.position.step, self.on_validation is None
        with StageProgress(
            self.console, self.name, num_steps, start, with_lines=with_lines
        ) as progress:
            while self.position.epoch < self.config.epochs and not self._is_out_of_patience():
                losses = self._train_epoch(progress, writer)
                if self.position.epoch % self.config.validate_every == 0 or self._is_last_epoch():
                    self._validate_and_save(validate, losses, writer)
                    progress.note(self._in_words("valid", self.position.curve[-1]))
                elif self._is_due():
                    self._save()
            progress.note(self._in_words("best valid", self.best))

    @property
    def best(self) -> dict[str, Any]:
        """The first validation with the best monitored metric, an entry of the curve."""
        return max(self.position.curve, key=self._goodness)

    @property
    def best_checkpoint(self) -> Path:
        return checkpoint.folder_of_step(self._checkpoints, self.best["step"])

    def _in_words(self, which: str, entry: dict[str, Any]) -> str:
        return f"{which} {self.monitor} {entry['metrics'][self.monitor]:.4f}"

    def _goodness(self, entry: dict[str, Any]) -> float:
        return goodness(self.monitor, entry["metrics"][self.monitor])

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _is_last_epoch(self) -> bool:
        return self.position.epoch == self.config.epochs

    def _is_out_of_patience(self) -> bool:
        curve = self.position.curve
        since_best = len(curve) - 1 - curve.index(self.best)
        return self.config.patience is not None and since_best >= self.config.patience

    def _is_due(self) -> bool:
        every = self.config.checkpoint_every
        return every is not None and self.position.step % every == 0

    # --- steps -----------------------------------------------------------------------------

    def _train_epoch(self, progress: StageProgress, writer: EventFile | None) -> dict[str, float]:
        """The rest of a pass over the users; mean of each objective's loss over all its steps."""
        self.model.train()
        position = self.position
        steps_per_epoch = self.config.steps_in(self.loader.steps_per_epoch)
        sums = torch.tensor(position.loss_sums or [0.0] * len(self.learner.names))
        first = position.epoch_step * self.config.accumulate_steps
        for taken in self._take(self.loader.steps(position.epoch, first)):
            position.step += 1
            position.epoch_step += 1
            means = taken.means.cpu()
            sums += means
            loss = float(means.sum())
            if writer is not None:
                for name, mean in zip(self.learner.names, means.tolist(), strict=True):
                    writer.add_scalar(f"loss/{name}", mean, position.step)
            progress.advance(loss, taken.num_rows * self.ranks.world_size)
            if self._is_due() and position.epoch_step < steps_per_epoch:
                position.loss_sums = sums.tolist()
                self._save()
        position.epoch, position.epoch_step, position.loss_sums = position.epoch + 1, 0, []
        return dict(zip(self.learner.names, (sums / steps_per_epoch).tolist(), strict=True))

    def _take(self, batches: Iterator[Rows]) -> Iterator[TakenStep]:
        if self.pipeline is not None:  # its table is sharded, so that a step is a batch
            return self.pipeline.run(batches)
        groups = iter(lambda: list(itertools.islice(batches, self.config.accumulate_steps)), [])
        return itertools.starmap(self.step, groups)

    def step(self, *batches: Rows) -> TakenStep:
        """Forward and backward on this rank's rows of global batches, then one update.

        It goes by the mean of the batches' losses, each the mean over what its batch counts.
        """
        self.optimizers.prepare(self.position.step)
        num_rows, means = 0, []
        for rows in batches:
            loss, taken = self._forward(self.learner.draw(rows).to(self.ranks.device))
            (loss / len(batches)).backward()
            num_rows += taken.num_rows
            means.append(taken.means)
        self.optimizers.step()
        if self._averaged is not None:
            self._averaged.update(self.position.step)
        return TakenStep(num_rows, torch.stack(means).mean(0))

    def _prepared_forward(self, batch: Batch) -> tuple[Tensor, TakenStep]:
        """For the pipeline, of which a step is a batch."""
        self.optimizers.prepare(batch.step)
        return self._forward(batch)

    def _forward(self, batch: Batch) -> tuple[Tensor, TakenStep]:
        """Up to the loss; one that is not finite ends training before anything is updated."""
        out: StepLoss = self.model(batch)
        if not bool(torch.isfinite(out.means).all()):
            raise TrainingError(self._not_finite(out, batch))
        return out.loss, TakenStep(len(batch.rows), out.means)

    def _not_finite(self, out: StepLoss, batch: Batch) -> str:
        """Alike on every rank: what the first rank held whose own loss is not finite."""
        rank = self.ranks.rank
        items = batch.ids.values()[: batch.num_distinct]
        held = (
            f"rank {rank} held {int((batch.users >= 0).sum())} users with {len(items)} items "
            f"{items[:10].tolist()} …"
        )
        *_, held = min(gather_objects((bool(torch.isfinite(out.loss)), rank, held)))
        values = ", ".join(
            f"{name} {mean}"
            for name, mean in zip(self.learner.names, out.means.tolist(), strict=True)
        )
        with contextlib.suppress(CheckpointError):  # the loss is the worse news
            self._saver.wait()
        good = checkpoint.saved(self._checkpoints)
        return (
            f"{self.name}: loss is not finite at step {self.position.step} ({values}); {held}; "
            f"last good checkpoint: {good[-1] if good else 'none'}; lower the learning rate"
        )

    # --- checkpoints -----------------------------------------------------------------------

    def _validate_and_save(
        self, validate: Validate, losses: dict[str, float], writer: EventFile | None
    ) -> None:
        self.model.eval()
        with contextlib.nullcontext() if self._averaged is None else self._averaged.in_place():
            metrics = validate()
        position = self.position
        position.curve.append(
            {"epoch": position.epoch, "step": position.step, "losses": losses, "metrics": metrics}
        )
        if writer is not None:
            for name, value in metrics.items():
                writer.add_scalar(f"valid/{name}", value, position.step)
        self._save()
        with raised_together():
            if writer is not None:
                writer.check()
        if self.on_validation is not None:
            self._saver.wait()
            path = checkpoint.folder_of_step(self._checkpoints, position.step)
            self.on_validation(Validated(self.name, self.monitor, position.curve, path))

    def _save(self) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "vocabulary": self.numbering.digest,
            "position": asdict(self.position),
        }
        step, best_step = self.position.step, self.best["step"]
        self._saver.save(step, self._tensors(), state, best_step=best_step)

    def _resume(self) -> bool:
        """Take up the newest whole checkpoint of the same fingerprint, if there is one.

        Damaged ones and those of another fingerprint are moved beside the folder, never deleted;
        those of this fingerprint that were moved aside before are moved back.
        """
        found = self._newest_whole()
        if found is not None and found.state["fingerprint"] != self.fingerprint:
            old = self._move(self._checkpoints, self._aside(found.state["fingerprint"]))
            self._say(
                f"{self.name}: {self._checkpoints} was of another configuration or data; "
                f"moved to {old}; it is resumed if that returns, and pretrain.continue_from can "
                "start from it"
            )
            found = None
        if found is None and self._aside(self.fingerprint).is_dir():
            with raised_together():
                if self.ranks.is_first:  # no checkpoint, at most what an interrupted save left
                    shutil.rmtree(self._checkpoints, ignore_errors=True)
            self._move(self._aside(self.fingerprint), self._checkpoints)
            found = self._newest_whole()
        if found is None:
            return False
        found.load(self._tensors(), self.numbering.items)
        self.position = Position(**found.state["position"])
        self._say(f"{self.name}: resumed at epoch {self.position.epoch} from {found.path}")
        return True

    def _newest_whole(self) -> Checkpoint | None:
        for path in reversed(checkpoint.saved(self._checkpoints)):
            try:
                return Checkpoint.open(path, self.ranks)
            except CheckpointError as error:
                aside = self._move(path, self.folder / "checkpoints.damaged" / path.name)
                self._say(f"{self.name}: skipped, {error}; moved to {aside}")
        return None

    def _aside(self, fingerprint: str) -> Path:
        return self.folder / f"checkpoints.old-{fingerprint[:8]}"

    def _move(self, source: Path, target: Path) -> Path:
        with raised_together():
            if self.ranks.is_first:
                target = checkpoint.move(source, target)
        return target

    def _tensors(self) -> dict[str, Tensor]:
        averaged = {} if self._averaged is None else self._averaged.tensors()
        return model_tensors(self.model) | averaged | optimizer_tensors(self.optimizers)

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False)
