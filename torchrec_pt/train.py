"""The training loop that pretraining and fine-tuning share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from torchrec_pt import checkpoint
from torchrec_pt.config import TrainConfig
from torchrec_pt.data.batch import Batch, Rows
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, gather_objects, raised_together
from torchrec_pt.events import EventFile
from torchrec_pt.learner import Learner, StepLoss
from torchrec_pt.metrics import goodness
from torchrec_pt.optim import Optimizers
from torchrec_pt.progress import StageProgress
from torchrec_pt.train_pipeline import SparseDistPipeline, TakenStep, suits_pipeline

# Metrics on the validation split
Validate = Callable[[], dict[str, float]]


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""


@dataclass
class Position:
    """How far a stage has come; saved with every checkpoint.

    Attributes:
        curve: one entry per validation: epoch, step, mean losses of the last epoch, metrics.
    """

    epoch: int = 0
    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One stage: a sharded learner, its optimizers, and the folder it leaves behind.

    Args:
        learner: the module inside `model`.
        monitor: the validation metric that chooses the best checkpoint.
        fingerprint: names the configuration and inputs; a checkpoint of another one is not resumed.
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
        ranks: Ranks,
        console: Console | None,
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
        self.ranks = ranks
        self.console = console
        self.position = Position()
        self.pipeline: SparseDistPipeline | None = None
        if suits_pipeline(learner, ranks.device):
            self.pipeline = SparseDistPipeline(
                model, learner, optimizers, ranks.device, self._forward
            )

    def run(self, validate: Validate) -> Position:
        """Train to the end or until patience runs out; `best_checkpoint` then holds the result.

        Raises:
            TrainingError: the loss became NaN or infinite.
        """
        writer = EventFile(self.folder / "tensorboard") if self.ranks.is_first else None
        if not self._resume():
            self._validate_and_save(validate, {}, writer)
        num_steps = self.optimizers.num_steps
        with StageProgress(self.console, self.name, num_steps, self.position.step) as progress:
            while self.position.epoch < self.config.epochs and not self._is_out_of_patience():
                losses = self._train_epoch(progress, writer)
                self.position.epoch += 1
                if self.position.epoch % self.config.validate_every == 0 or self._is_last_epoch():
                    self._validate_and_save(validate, losses, writer)
                    progress.note(self._in_words("valid", self.position.curve[-1]))
            progress.note(self._in_words("best valid", self.best))
        return self.position

    @property
    def best(self) -> dict[str, Any]:
        """The first validation with the best monitored metric, an entry of the curve."""
        return max(self.position.curve, key=self._goodness)

    @property
    def best_checkpoint(self) -> Path:
        return self._checkpoints / f"step-{self.best['step']:08d}"

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

    # --- steps -----------------------------------------------------------------------------

    def _train_epoch(self, progress: StageProgress, writer: EventFile | None) -> dict[str, float]:
        """One pass over the users; mean of each objective's loss over its steps."""
        self.model.train()
        total = torch.zeros(len(self.learner.names))
        for taken in self._take(self.loader.steps(self.position.epoch)):
            self.position.step += 1
            means = taken.means.cpu()
            total += means
            loss = float(means.sum())
            if writer is not None:
                for name, mean in zip(self.learner.names, means.tolist(), strict=True):
                    writer.add_scalar(f"loss/{name}", mean, self.position.step)
            progress.advance(loss, taken.num_rows * self.ranks.world_size)
        mean = total / self.loader.steps_per_epoch
        return dict(zip(self.learner.names, mean.tolist(), strict=True))

    def _take(self, steps: Iterator[Rows]) -> Iterator[TakenStep]:
        return map(self.step, steps) if self.pipeline is None else self.pipeline.run(steps)

    def step(self, rows: Rows) -> TakenStep:
        """Forward, backward and update on this rank's rows of one global batch."""
        loss, taken = self._forward(self.learner.draw(rows).to(self.ranks.device))
        loss.backward()
        self.optimizers.step()
        return taken

    def _forward(self, batch: Batch) -> tuple[Tensor, TakenStep]:
        """Up to the loss; one that is not finite ends training before anything is updated."""
        self.optimizers.prepare(batch.step)
        out: StepLoss = self.model(batch)
        if not bool(torch.isfinite(out.means).all()):
            raise TrainingError(self._not_finite(out, batch))
        return out.loss, TakenStep(len(batch.rows), out.means)

    def _not_finite(self, out: StepLoss, batch: Batch) -> str:
        """Alike on every rank: what the first rank held whose own loss is not finite."""
        rank = self.ranks.rank
        users = batch.users[batch.users >= 0]
        items = batch.ids.values()[: batch.num_distinct]
        held = (
            f"rank {rank} held {len(users)} users {users[:10].tolist()} … "
            f"with {len(items)} items {items[:10].tolist()} …"
        )
        *_, held = min(gather_objects((bool(torch.isfinite(out.loss)), rank, held)))
        values = ", ".join(
            f"{name} {mean}"
            for name, mean in zip(self.learner.names, out.means.tolist(), strict=True)
        )
        good = checkpoint.saved(self._checkpoints)
        return (
            f"{self.name}: loss is not finite at step {batch.step} ({values}); {held}; "
            f"last good checkpoint: {good[-1] if good else 'none'}; lower the learning rate"
        )

    # --- checkpoints -----------------------------------------------------------------------

    def _validate_and_save(
        self, validate: Validate, losses: dict[str, float], writer: EventFile | None
    ) -> None:
        self.model.eval()
        metrics = validate()
        position = self.position
        position.curve.append(
            {"epoch": position.epoch, "step": position.step, "losses": losses, "metrics": metrics}
        )
        if writer is not None:
            for name, value in metrics.items():
                writer.add_scalar(f"valid/{name}", value, position.step)
        tensors = self._model_tensors() | self._optimizer_tensors()
        state: dict[str, Any] = {"fingerprint": self.fingerprint, "position": asdict(position)}
        checkpoint.save(self._checkpoints, position.step, tensors, state, self.ranks)
        if self.ranks.is_first:
            checkpoint.prune(self._checkpoints, self.config.keep_checkpoints, self.best_checkpoint)
        with raised_together():
            if writer is not None:
                writer.check()

    def _resume(self) -> bool:
        """Take up the newest whole checkpoint of the same fingerprint, if there is one."""
        for path in reversed(checkpoint.saved(self._checkpoints)):
            try:
                state = checkpoint.load_state(path)
            except checkpoint.CheckpointError as error:
                self._say(f"{self.name}: skipped, {error}")
                continue
            if state["fingerprint"] != self.fingerprint:
                self._say(f"{self.name}: {path} is of another configuration or data; started anew")
                break
            checkpoint.load(path, self._model_tensors() | self._optimizer_tensors())
            self.position = Position(**state["position"])
            self._say(f"{self.name}: resumed at epoch {self.position.epoch} from {path}")
            return True
        dist.barrier()
        if self.ranks.is_first:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        return False

    def _model_tensors(self) -> dict[str, Tensor]:
        return {f"model.{name}": value for name, value in self.model.state_dict().items()}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {f"optimizer.{name}": value for name, value in self.optimizers.state().items()}

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False)
