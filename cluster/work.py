"""What the processes of a job are given, and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.logs import Log
from cluster.screen import Screen
from cluster.stages import Stage
from cluster.storage import Storage
from torchrec_pt.config import RunConfig
from torchrec_pt.files import refused

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """Attributes:
    folder: relative paths of the configuration are taken from here; None stays where Ray
        starts its workers.
    screen: shows what rank 0 prints.
    """

    config: RunConfig
    folder: Path | None
    screen: Screen

    @property
    def run_dir(self) -> Path:
        """Absolute where anything makes it so."""
        return (self.folder or Path()) / self.config.run_dir


@dataclass(frozen=True)
class StageWork:
    """One stage of it.

    Attributes:
        job: the run's name, in logs and in the storage.
        tasks: those whose fine-tuning is finished; for the last stage.
        is_elastic: the number of workers may change.
        storage: where stages are kept besides run_dir.
        ingest: who reads the raw log, "local" or "ray".
    """

    work: Work
    job: str
    stage: Stage
    tasks: tuple[str, ...] = ()
    is_elastic: bool = False
    storage: str | None = None
    ingest: str = "local"

    def as_dict(self) -> dict[str, Any]:
        """Ray Train wants a dictionary."""
        return {"given": self}

    def log(self, rank: int | str) -> Log:
        return Log(self.work.run_dir, job=self.job, stage=self.stage.name, rank=rank)

    def fetch(self) -> None:
        """Bring what the stage starts from to this node's run_dir."""
        if self.storage is not None:
            run_dir = self.work.config.run_dir
            Storage.open(self.storage, self.job).fetch(run_dir, self.stage.reads)

    def leave(self) -> None:
        """Keep what the stage has made so far."""
        if self.storage is not None:
            run_dir = self.work.config.run_dir
            Storage.open(self.storage, self.job).leave(run_dir, self.stage.writes)


@dataclass(frozen=True)
class Finished:
    """Attributes:
    pickled_result: of the last stage a RunResult, else None. Bytes, so that who hands it on
        need not import TorchRec.
    """

    pickled_result: bytes


@dataclass(frozen=True)
class Refused:
    """A run that ended by an error that trying again does not mend.

    Attributes:
        message: one line for the user.
        exit_code: that of `torchrec-pt` for the same error.
    """

    message: str
    exit_code: int


def refused_or(do: Callable[[], T]) -> T | Refused:
    """What it returns, or what trying again does not mend; anything else is raised."""
    try:
        return do()
    except (ValueError, OSError, RuntimeError) as error:
        code = exit_code_of(error)
        if code is None:
            raise
        return Refused(refused(error) if isinstance(error, OSError) else str(error), code)


def exit_code_of(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for a run that failed by itself, None for all else."""
    from torchrec_pt.distributed import LostWorkerError

    if isinstance(error, ValueError | OSError):
        return 2
    if isinstance(error, LostWorkerError):
        return None  # Ray Train starts the workers again
    return 1 if type(error).__module__.startswith("torchrec_pt") else None
