"""The pipeline on Ray: each stage a task, and where ranks train together Ray Train's workers.

What may start when is decided by `stages` and `resources`; what is done before is known by the
library, whose fingerprints make such a stage end at once.
"""

from __future__ import annotations

import os
import pickle
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.job_file import JobFile
from cluster.observer import SCORE, Watch
from cluster.resources import num_side_by_side
from cluster.screen import failures, last_line
from cluster.stages import (
    EVALUATE,
    PREPARE,
    Outcome,
    Stage,
    exit_code,
    finished_tasks,
    ready,
    skipped,
    stages_of,
)
from cluster.worker import Finished, Refused, StageWork, Work, prepare, train_loop

if TYPE_CHECKING:
    from torchrec_pt.pipeline import RunResult

# Of Ray Train's controller and workers. Without the first two, every library's INFO lines go to
# the console; the last is how often (in seconds) the controller looks at the workers.
ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# While stages wait for room: the cluster may have grown.
LOOK_AGAIN_S = 10.0

Ended = tuple[Outcome, bytes]  # a stage's task gives its result as it came, pickled


@dataclass(frozen=True)
class GraphResult:
    """Attributes:
    outcomes: name of the stage -> how it ended, in the order of their ends.
    run: what there is to show; None where nothing could be judged.
    exit_code: of the job.
    """

    outcomes: dict[str, Outcome]
    run: RunResult | None
    exit_code: int


def run_graph(job: JobFile, work: Work, *, on_gpus: bool) -> GraphResult:
    """Every stage of the run, side by side where they need not wait for each other.

    A stage that fails ends what needs it, and nothing else.
    """
    started_at = time.monotonic()
    stages = stages_of(work.config)
    given = {stage.name: StageWork(work, job.name, stage, storage=job.storage) for stage in stages}
    ended: dict[str, Outcome] = {}
    running: dict[ray.ObjectRef[Ended], Stage] = {}
    result: RunResult | None = None
    while True:
        ended |= skipped(stages, ended)
        begun = {stage.name for stage in running.values()}
        for stage in ready(stages, begun, ended)[: max(0, _room(job, on_gpus) - len(running))]:
            tasks = finished_tasks(ended)
            running[_begin(job, replace(given[stage.name], tasks=tasks), on_gpus)] = stage
        if not running:
            return GraphResult(ended, result, exit_code(stages, ended))
        for done in ray.wait(list(running), timeout=LOOK_AGAIN_S)[0]:
            stage = running.pop(done)
            ended[stage.name], pickled = _outcome(done)
            if stage.kind == EVALUATE and ended[stage.name].state == "done":
                result = replace(pickle.loads(pickled), seconds=time.monotonic() - started_at)


def _room(job: JobFile, on_gpus: bool) -> int:
    """Stages that fit into the cluster as it is now."""
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0)) if on_gpus else None
    return num_side_by_side(job.min_workers, int(resources.get("CPU", 0)), num_gpus)


def _begin(job: JobFile, given: StageWork, on_gpus: bool) -> ray.ObjectRef[Ended]:
    if given.stage.kind == PREPARE:
        prepare = _prepare.options(name=given.stage.name, num_cpus=1, max_retries=job.max_failures)
        return prepare.remote(given)
    # Ray Train's controller stands on the node of the task; when that is the driver's, no other
    # node's end is more than the end of workers.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    train = _train.options(
        name=given.stage.name, num_cpus=0, max_retries=0, scheduling_strategy=here
    )
    return train.remote(job, given, on_gpus)


def _outcome(task: ray.ObjectRef[Ended]) -> Ended:
    try:
        return ray.get(task)
    except RayError as error:
        return Outcome("failed", last_line(error), 1), b""


@ray.remote
def _prepare(given: StageWork) -> Ended:
    started_at = time.monotonic()
    return _ended(prepare(given), started_at)


@ray.remote
def _train(job: JobFile, given: StageWork, on_gpus: bool) -> Ended:
    os.environ.update(ENVIRONMENT)
    if given.work.folder is not None:
        os.chdir(given.work.folder)
    started_at = time.monotonic()
    try:
        result: Any = trainer(job, given, on_gpus).fit()
    except ray.train.TrainingFailedError as error:
        said = failures(getattr(error, "worker_failures", {})) or last_line(error)
        message = f"{said}; submitted again, it goes on from its last checkpoint"
        return Outcome("failed", message, 1, time.monotonic() - started_at), b""
    return _ended(result.return_value, started_at)


def _ended(trained: Finished | Refused, started_at: float) -> Ended:
    seconds = time.monotonic() - started_at
    if isinstance(trained, Refused):
        return Outcome("failed", trained.message, trained.exit_code, seconds), b""
    return Outcome("done", seconds=seconds), trained.pickled_result


def trainer(job: JobFile, given: StageWork, on_gpus: bool) -> TorchTrainer:
    """Ray Train around one stage.

    <run_dir>/ray/<stage>, or that folder of the storage, is `ray.train.Result.from_path`'s.
    """
    stage, config = given.stage, given.work.config
    kept = config.finetune.tasks.get(stage.task, config.pretrain)
    # mypy sees the types of Ray Train's first version.
    is_elastic = job.min_workers < job.max_workers
    num_workers: Any = (job.min_workers, job.max_workers) if is_elastic else job.max_workers
    folder = config.run_dir.absolute() / "ray"
    shutil.rmtree(folder / stage.slug, ignore_errors=True)  # the report of an earlier job
    return TorchTrainer(
        train_loop,  # type: ignore[arg-type]  # Ray's own type has no room for a result
        train_loop_config=given.as_dict(),
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo"),
        # One CPU is what Ray reserves for a worker, not all that it uses: see num_threads.
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            elastic_resize_monitor_interval_s=job.resize_interval_s,  # type: ignore[call-arg]
            use_gpu=on_gpus,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if on_gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=stage.slug,
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=job.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=kept.keep_checkpoints if kept is not None else 1,
                checkpoint_score_attribute=SCORE,
            ),
            callbacks=[Watch(given, job.max_failures)],  # type: ignore[list-item]  # typed as of Tune
        ),
    )
