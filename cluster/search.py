"""A search inside the cluster: Ray Tune around the trials of torchrec_pt's `tune`.

Everything here runs on the cluster's nodes, which see the same run_dir; the driver only shows.
"""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from rich.console import Console

from cluster.screen import last_line
from cluster.work import Refused, Work, refused_or
from torchrec_pt.config import RunConfig

if TYPE_CHECKING:
    from cluster.proposals import Proposals
    from torchrec_pt.trials import Trial
    from torchrec_pt.tune import Found, Progress

# Of Tune's processes: no result files of its own, no folder of its own to stand in, and time for a
# trial that is stopped to end what it writes before its process takes the next one.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "3600",
}
EPOCH = "epoch"
# ASHA lets one of so many trials go on at each rung (Li et al. 2020, "eta").
REDUCTION_FACTOR = 3


@ray.remote(num_cpus=0, max_retries=0)
def search(work: Work, num_parallel: int, num_cpus: int, num_gpus: int) -> Refused | None:
    """The whole search, and what it found on the screen.

    Args:
        num_parallel: trials at a time.
        num_cpus, num_gpus: of each.
    """

    def do() -> Refused | None:
        from torchrec_pt.trials import print_trials

        ended = _search(work, num_parallel, num_cpus, num_gpus)
        if isinstance(ended, Refused):
            return ended
        console = _console(work)
        print_trials(ended.trials, console)
        console.print(f"The run with the best values: {ended.best}", highlight=False)
        return None

    return refused_or(do)


def _search(work: Work, num_parallel: int, num_cpus: int, num_gpus: int) -> Found | Refused:
    if find_spec("optuna") is None:
        raise ValueError(
            "cluster.tune: optuna is not installed; pip install optuna, on every node, or use "
            "torchrec-pt tune"
        )
    from cluster.proposals import Proposals
    from torchrec_pt.data.dataset import PreparedDataset
    from torchrec_pt.trials import read_trials
    from torchrec_pt.tune import found

    _enter(work)
    begun = ray.get(_begin.options(num_cpus=num_cpus, num_gpus=num_gpus).remote(work, num_cpus))
    if isinstance(begun, Refused):
        return begun
    dataset = PreparedDataset.load(work.config.prepared_dir)
    record = Record(work, dataset, read_trials(work.config, dataset))
    proposals = Proposals(work.config, record.ended)
    if record.ended:
        record.say(f"tune: {len(record.ended)} trials ended before")
    if proposals.waiting:
        trial = tune.with_parameters(_trial, work=work, num_threads=num_cpus)
        trial = tune.with_resources(trial, {"cpu": num_cpus, "gpu": num_gpus})
        results = _tuner(trial, work.config, proposals, record, num_parallel).fit()
        if record.refused is not None:
            return record.refused
        if results.errors:
            goes_on = "the same command goes on after the trials that ended"
            return Refused(f"{last_line(results.errors[0])}; {goes_on}", 1)
    return found(work.config, record.ended.values())


def _tuner(
    trial: Any, config: RunConfig, proposals: Proposals, record: Record, num_parallel: int
) -> tune.Tuner:
    from cluster.proposals import SCORE
    from torchrec_pt.trials import settings

    max_t = _max_epochs(config) + 1  # so that ASHA ends no trial by itself
    return tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=tune.schedulers.ASHAScheduler(
                time_attr=EPOCH,
                metric=SCORE,
                mode="max",
                max_t=max_t,
                grace_period=min(settings(config).grace_epochs, max_t),
                reduction_factor=REDUCTION_FACTOR,
            ),
            num_samples=len(proposals.waiting),
            max_concurrent_trials=num_parallel,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"job-{ray.get_runtime_context().get_job_id()}",
            storage_path=str((config.run_dir / "tune" / "ray").absolute()),
            failure_config=tune.FailureConfig(fail_fast=True),
            callbacks=[record],
            stop=record,
            verbose=0,
        ),
    )


@ray.remote(max_retries=0)
def _begin(work: Work, num_threads: int) -> Refused | None:
    """What all trials share."""

    def begin() -> None:
        from torchrec_pt.tune import begin

        begin(work.config, _console(work))

    _enter(work, num_threads)
    return refused_or(begin)


def _trial(given: dict[str, Any], work: Work, num_threads: int) -> None:
    """What Tune calls for a proposal; it reports the trial as it would be if it ended there."""
    from cluster.proposals import SCORE
    from torchrec_pt.trials import Trial
    from torchrec_pt.tune import run_trial

    number, values = given["number"], given["values"]

    def report(trial: Trial) -> None:
        score, epochs = trial.score, trial.epochs
        tune.report({SCORE: score, EPOCH: epochs, "trial": dataclasses.asdict(trial)})

    def on_progress(now: Progress) -> None:
        if 0 < now.epoch < now.num_epochs:
            report(Trial(number, values, "stopped", now.monitor, now.metrics, now.epoch))

    _enter(work, num_threads)
    ended = refused_or(lambda: run_trial(work.config, number, values, on_progress))
    if isinstance(ended, Refused):
        tune.report({SCORE: float("-inf"), EPOCH: 0, "refused": dataclasses.asdict(ended)})
    else:
        report(ended)


class Record(tune.Callback, tune.Stopper):
    """Writes and shows each trial that ends; a mistake of the user ends the search.

    Attributes:
        ended: number -> trial.
    """

    def __init__(self, work: Work, dataset: Any, ended: dict[int, Trial]) -> None:
        self.ended = ended
        self.refused: Refused | None = None
        self._work = work
        self._dataset = dataset

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        from torchrec_pt.trials import Trial, fingerprint, in_words, settings, write_trials

        result = trial.last_result
        if "refused" in result:
            self.refused = Refused(**result["refused"])
            return
        config, one = self._work.config, Trial(**result["trial"])
        name = fingerprint(config, self._dataset, one.number, one.values)
        seconds = one.seconds or result["time_total_s"]
        self.ended[one.number] = dataclasses.replace(one, fingerprint=name, seconds=seconds)
        write_trials(config, self.ended.values())
        num_trials = settings(config).num_trials
        self.say(in_words(self.ended[one.number], self.ended.values(), num_trials))

    def say(self, text: str) -> None:
        _console(self._work).print(text, highlight=False)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.refused is not None


def _max_epochs(config: RunConfig) -> int:
    """Of any trial."""
    from torchrec_pt.trials import judged, settings

    space, task = settings(config).space, settings(config).task
    searched = space.get("pretrain.epochs" if task == "pretrain" else f"finetune.{task}.epochs")
    return max(judged(config, task).epochs, *(searched.examples if searched else (1,)))


def _enter(work: Work, num_threads: int = 1) -> None:
    import torch

    if work.folder is not None:
        os.chdir(work.folder)
    torch.set_num_threads(num_threads)


def _console(work: Work) -> Console:
    return Console(file=work.screen, soft_wrap=True, markup=False, emoji=False)
