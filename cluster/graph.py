"""The pipeline on Ray: each stage a task, and where ranks train together Ray Train's workers.

What may start when is decided by `stages` and `resources`; what is done before is known by the
library, whose fingerprints make such a stage end at once.
"""

from __future__ import annotations

import os
import pickle
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from pyarrow import fs
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.job_file import JobFile
from cluster.logs import DRIVER
from cluster.observer import SCORE, Watch
from cluster.resources import num_places, num_side_by_side
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
from cluster.storage import Storage
from cluster.work import Finished, Refused, StageWork, Work
from cluster.worker import prepare, train_loop

if TYPE_CHECKING:
    from torchrec_pt.pipeline import RunResult

# Of Ray Train's controller and workers, where the job's environment says nothing else. Without the
# first two, every library's INFO lines go to the console; then how often (in seconds) the
# controller looks at the workers.
ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# A lost node is missed late, and an elastic stage may ask for as many workers as before meanwhile:
# for so long (in seconds; Ray's own is 60 in all stages) until it asks again for those that fit.
ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
# While stages wait for room: the cluster may have grown.
LOOK_AGAIN_S = 10.0

Ended = tuple[Outcome, bytes]  # what a stage's task gives; its result is still pickled


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

    A stage that fails ends those that need it, and no others.
    """
    started_at = time.monotonic()
    stages = stages_of(work.config)
    ended: dict[str, Outcome] = {}
    running: dict[ray.ObjectRef[Ended], StageWork] = {}
    result: RunResult | None = None
    while True:
        ended |= skipped(stages, ended)
        begun = {given.stage.name for given in running.values()}
        room = num_side_by_side(job.min_workers, num_places(ray.cluster_resources(), on_gpus))
        for stage in ready(stages, begun, ended)[: max(0, room - len(running))]:
            given = _stage_work(job, work, stage, finished_tasks(ended))
            given.log(DRIVER).write("begun")
            running[_begin(job, given, on_gpus)] = given
        if not running:
            return GraphResult(ended, result, exit_code(stages, ended))
        for task in ray.wait(list(running), timeout=LOOK_AGAIN_S)[0]:
            given = running.pop(task)
            outcome, pickled = _outcome(task)
            ended[given.stage.name] = outcome
            given.log(DRIVER).write("ended", **asdict(outcome))
            if outcome.state == "failed":
                work.screen.say(f"{given.stage.name}: failed; {outcome.message}")
            elif given.stage.kind == EVALUATE:
                result = replace(pickle.loads(pickled), seconds=time.monotonic() - started_at)


def _stage_work(job: JobFile, work: Work, stage: Stage, tasks: tuple[str, ...]) -> StageWork:
    return StageWork(
        work,
        job.name,
        stage,
        tasks=tasks,
        is_elastic=job.min_workers < job.max_workers,
        storage=job.storage,
        ingest=job.ingest,
    )


def _begin(job: JobFile, given: StageWork, on_gpus: bool) -> ray.ObjectRef[Ended]:
    """Start the stage's task."""
    name = given.stage.name
    if given.stage.kind == PREPARE:
        num_cpus = 0 if given.ingest == "ray" else 1  # which leaves them to Ray Data's tasks
        preparing = _prepare.options(name=name, num_cpus=num_cpus, max_retries=job.max_failures)
        return preparing.remote(given)
    # Ray Train's controller stands on the node of the task; where that is the driver's, the end
    # of another node is no more than the end of workers.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    training = _train.options(name=name, num_cpus=0, max_retries=0, scheduling_strategy=here)
    return training.remote(job, given, on_gpus)


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
    os.environ.update(ENVIRONMENT | (ELASTIC if given.is_elastic else {}) | os.environ)
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


def _ended(came: Finished | Refused, started_at: float) -> Ended:
    seconds = time.monotonic() - started_at
    if isinstance(came, Refused):
        return Outcome("failed", came.message, came.exit_code, seconds), b""
    return Outcome("done", seconds=seconds), came.pickled_result


def trainer(job: JobFile, given: StageWork, on_gpus: bool) -> TorchTrainer:
    """Ray Train around one stage; <run_dir>/ray/<stage> is what `Result.from_path` takes."""
    stage, finetune = given.stage, given.work.config.finetune
    settings = finetune.tasks.get(stage.task, given.work.config.pretrain)
    system, folder = _place_of_reports(given)
    # mypy sees the types of Ray Train's first version.
    limits: Any = (job.min_workers, job.max_workers)
    return TorchTrainer(
        train_loop,  # type: ignore[arg-type]  # Ray's own type has no room for a result
        train_loop_config=given.as_dict(),
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo"),
        # One CPU is what Ray reserves for a worker, not all that it uses: see num_threads.
        scaling_config=ray.train.ScalingConfig(
            num_workers=limits if given.is_elastic else job.max_workers,
            elastic_resize_monitor_interval_s=job.resize_interval_s,  # type: ignore[call-arg]
            use_gpu=on_gpus,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if on_gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=stage.slug,
            storage_path=folder,
            storage_filesystem=system,
            failure_config=ray.train.FailureConfig(max_failures=job.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=settings.keep_checkpoints if settings is not None else 1,
                checkpoint_score_attribute=SCORE,
            ),
            callbacks=[Watch(given, job.max_failures)],  # type: ignore[list-item]
        ),
    )


def _place_of_reports(given: StageWork) -> tuple[fs.FileSystem, str]:
    """For Ray Train's own files, where every node sees them; without those of an earlier job."""
    system, folder = fs.LocalFileSystem(), str(given.work.config.run_dir.absolute() / "ray")
    if given.storage is not None:
        storage = Storage.open(given.storage, given.job)
        system, folder = storage.system, f"{storage.root}/ray"
    place = f"{folder}/{given.stage.slug}"
    if system.get_file_info(place).type == fs.FileType.Directory:
        system.delete_dir(place)
    return system, folder
