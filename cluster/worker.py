"""What one Ray Train worker does: the run, exactly as it goes without Ray.

`torchrec_pt.distributed.join_ranks` finds the process group that Ray Train made. This module
is also imported where nothing trains (the driver, Ray Train's controller), so it imports
TorchRec, which takes seconds, only inside `train_loop`.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from rich.console import Console

from cluster.resources import num_threads
from cluster.screen import Screen
from torchrec_pt.config import RunConfig
from torchrec_pt.files import refused

if TYPE_CHECKING:
    from torchrec_pt.pipeline import Evaluation


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

    def as_dict(self) -> dict[str, Any]:
        """Ray Train wants a dictionary."""
        return {"work": self}


@dataclass(frozen=True)
class Finished:
    """Attributes:
    pickled_result: a RunResult. Bytes, so that who hands it on need not import TorchRec.
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


def train_loop(given: dict[str, Any]) -> Finished | Refused:
    """The whole run on this rank; Ray Train hands what rank 0 returns to the driver.

    A mistake of the user is returned, not raised: Ray Train would start the workers again
    to meet it once more.
    """
    import torch
    import torch.distributed as dist

    from torchrec_pt import pipeline

    work: Work = given["work"]
    context = ray.train.get_context()
    if work.folder is not None:
        os.chdir(work.folder)
    torch.set_num_threads(num_threads(_num_node_cpus(), context.get_local_world_size()))
    console = None
    if context.get_world_rank() == 0:
        console = Console(file=work.screen, soft_wrap=True, markup=False, emoji=False)
    try:
        result = pipeline.run(work.config, console)
    except (ValueError, OSError, RuntimeError) as error:
        code = exit_code_of(error)
        if code is None:
            raise
        # A rank that did not fail waits in a collective: leaving the group wakes it.
        dist.destroy_process_group()
        return Refused(refused(error) if isinstance(error, OSError) else str(error), code)
    ray.train.report(flat_metrics(result.evaluation))
    return Finished(pickle.dumps(result))


def exit_code_of(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for a run that failed by itself, None for all else."""
    from torchrec_pt.distributed import LostWorkerError

    if isinstance(error, ValueError | OSError):
        return 2
    if isinstance(error, LostWorkerError):
        return None  # Ray Train starts the workers again
    return 1 if type(error).__module__.startswith("torchrec_pt") else None


def flat_metrics(evaluation: Evaluation) -> dict[str, float]:
    """task/model/metric -> value, as Ray Train reports metrics."""
    return {
        f"{task}/{model}/{metric}": value
        for task, result in evaluation.items()
        for model, metrics in result.metrics.items()
        for metric, value in metrics.items()
    }


def _num_node_cpus() -> int:
    """Ray's count: in a container it is the container's share, os.cpu_count() is the machine's."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return int(node["Resources"].get("CPU", 1))
