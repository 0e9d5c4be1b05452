"""What one process of a stage does: the library's own stage, exactly as it goes without Ray.

`torchrec_pt.distributed.join_ranks` finds the process group that Ray Train made. This module
is also imported where nothing trains (the driver, Ray Train's controller), so it imports
TorchRec, which takes seconds, only inside of functions.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from cluster.resources import num_threads
from cluster.screen import Lines
from cluster.stages import EVALUATE, FINETUNE, PREPARE
from cluster.work import Finished, Refused, StageWork, Work, refused_or

if TYPE_CHECKING:
    from torchrec_pt.pipeline import RunResult
    from torchrec_pt.train import OnValidation


def train_loop(loop_config: dict[str, Any]) -> Finished | Refused:
    """The stage on this rank; Ray Train hands what rank 0 returns to the driver.

    A mistake of the user is returned, not raised: Ray Train would start the workers again
    to meet it once more.
    """
    import torch.distributed as dist

    from cluster.observer import Observer
    from torchrec_pt.distributed import joined_ranks, raised_together

    given: StageWork = loop_config["given"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    _enter(given.work, context.get_local_world_size())
    console = Lines(given.work.screen) if rank == 0 else None
    log = given.log(rank)

    def do() -> Finished:
        with joined_ranks():
            if context.get_local_world_size() < num_workers:
                _require_shared(given, rank)
            with raised_together():
                if rank == 0:
                    given.fetch()
                log.write("started", num_workers=num_workers, **_here())
            if console is not None and given.is_elastic:
                console.print(f"{given.stage.name}: on {num_workers} workers", highlight=False)
            observer = Observer(given, log, console)
            started_at = time.monotonic()
            result = run_stage(given, console, observer)
            observer.report_end(result)
            with raised_together():
                log.write("ended", seconds=time.monotonic() - started_at)
                if rank == 0:
                    given.leave()
        return Finished(pickle.dumps(result))

    ended = refused_or(do)
    if isinstance(ended, Refused):
        with contextlib.suppress(OSError):  # which may be what was refused
            log.write("refused", message=ended.message)
        if dist.is_initialized():
            # A rank that did not fail waits in a collective: leaving the group wakes it.
            dist.destroy_process_group()
    return ended


def prepare(given: StageWork) -> Finished | Refused:
    """The stage that no other rank takes part in, in a process of its own."""
    from torchrec_pt.distributed import joined_ranks

    _enter(given.work, 1)
    log = given.log(0)

    def do() -> Finished:
        given.fetch()
        log.write("started", num_workers=1, **_here())
        started_at = time.monotonic()
        console = Lines(given.work.screen)
        if given.ingest == "ray":
            from cluster.ingest import prepare_on_ray

            prepare_on_ray(given.work.config, console)  # which the library then finds done
        with joined_ranks():
            run_stage(given, console, None)
        log.write("ended", seconds=time.monotonic() - started_at)
        given.leave()
        return Finished(pickle.dumps(None))

    return refused_or(do)


def run_stage(
    given: StageWork, console: Lines | None, on_validation: OnValidation | None
) -> RunResult | None:
    """What the library does for the stage; a result comes of the last one alone."""
    from torchrec_pt import pipeline

    config, stage = given.work.config, given.stage
    if stage.kind == PREPARE:
        pipeline.check(config, pipeline.prepare(config, console))
    elif stage.kind == FINETUNE:
        pipeline.finetune(config, console, on_validation, tasks=[stage.task])
    elif stage.kind == EVALUATE:
        return _judge_and_export(given, console)
    elif config.finetune.start_from is not None:
        pipeline.finetune(config, console, on_validation, tasks=())
    else:
        pipeline.pretrain(config, console, on_validation)
    return None


def _judge_and_export(given: StageWork, console: Lines | None) -> RunResult:
    from torchrec_pt import pipeline

    config = given.work.config
    evaluation = pipeline.evaluate(config, console, tasks=given.tasks)
    if console is not None and "ranking" in set(config.finetune.tasks) - set(given.tasks):
        console.print("export: not fine-tuned for ranking, so the pretrained model is exported")
    exported = pipeline.export_run(config, console)
    pipeline.report_run(config, console)
    user, offered = pipeline.recommend(config, config.show.user, config.show.k)
    return pipeline.RunResult(evaluation, exported, user, offered, seconds=0.0)


def _enter(work: Work, num_node_workers: int) -> None:
    import torch

    if work.folder is not None:
        os.chdir(work.folder)
    torch.set_num_threads(num_threads(_num_node_cpus(), num_node_workers))


def _require_shared(given: StageWork, rank: int) -> None:
    """All ranks call it.

    Raises:
        ValueError: a node does not see what the first rank writes to run_dir.
    """
    from torchrec_pt.distributed import raised_together

    run_dir = given.work.config.run_dir
    mark = run_dir / f".seen-by-{given.stage.slug}"
    with raised_together():
        if rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            mark.touch()
    with raised_together():
        if not mark.exists():
            node = ray.util.get_node_ip_address()
            raise ValueError(
                f"run_dir: must be one folder for all workers, {run_dir} on node {node} is "
                "another; put it on storage that every node sees"
            )
    if rank == 0:
        mark.unlink(missing_ok=True)


def _here() -> dict[str, Any]:
    return {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}


def _num_node_cpus() -> int:
    """Ray's count: in a container it is the container's share, os.cpu_count() is the machine's."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return int(node["Resources"].get("CPU", 1))
