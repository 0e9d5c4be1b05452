"""A search for better values of some keys: each trial a run of its own, judged on validation.

Values are drawn at random (Bergstra and Bengio 2012), each a function of the seed, so that a search
that was killed goes on with the same trials. The test split is not looked at.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from torchrec_pt import checkpoint, pipeline, trials
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import ConfigError
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks, raised_together
from torchrec_pt.metrics import goodness
from torchrec_pt.train import TrainingError, Validated
from torchrec_pt.trials import Trial


@dataclass(frozen=True)
class Progress:
    """How far a trial has come after a validation.

    Attributes:
        epoch: done, of num_epochs.
        metrics: of the best validation so far by `monitor`.
    """

    epoch: int
    num_epochs: int
    monitor: str
    metrics: dict[str, float]

    @property
    def score(self) -> float:
        """Larger is better."""
        return goodness(self.monitor, self.metrics[self.monitor])


@dataclass(frozen=True)
class Found:
    """Attributes:
    trials: all that ended, by number.
    best: the run with the best values, as `torchrec-pt run` takes it.
    """

    trials: list[Trial]
    best: Path


def tune(config: RunConfig, console: Console | None = None) -> Found:
    """Search `config.tune.space`, one trial after the other; what ended before is not run again.

    Raises:
        ValueError: no [tune] section, or data or a configuration that cannot be used as it stands.
        TrainingError: no trial came to its end.
    """
    num_trials = trials.settings(config).num_trials
    with joined_ranks() as ranks:
        screen = console if ranks.is_first else None
        dataset = begin(config, console)
        planned = dict(trials.trials_to_run(config))
        with raised_together():
            before = trials.read_trials(config, dataset).values()
        ended = {
            trial.number: trial
            for trial in before
            if trial.values == planned.get(trial.number) and trial.state != "stopped"
        }
        if screen is not None and ended:
            screen.print(f"tune: {len(ended)} of {num_trials} trials ended before", highlight=False)
        for number, values in planned.items():
            if number in ended:
                continue
            with _spinner(screen, f"trial {number} of {num_trials}"):
                trial = run_trial(config, number, values)
            name = trials.fingerprint(config, dataset, number, values)
            ended[number] = dataclasses.replace(trial, fingerprint=name)
            with raised_together():
                if ranks.is_first:
                    trials.write_trials(config, ended.values())
            if screen is not None:
                line = trials.in_words(ended[number], ended.values(), num_trials)
                screen.print(line, highlight=False)
        return found(config, ended.values())


def begin(config: RunConfig, console: Console | None = None) -> PreparedDataset:
    """What all trials share: the prepared data, and the pretrained model if none changes it."""
    dataset = pipeline.prepare(config, console)
    if _shares_pretraining(config):
        pipeline.pretrain(config, console)
    return dataset


def run_trial(
    config: RunConfig,
    number: int,
    values: Mapping[str, Any],
    on_progress: Callable[[Progress], None] | None = None,
) -> Trial:
    """Train and validate one trial of the search that `begin` began.

    A loss that is not finite, and values that do not go together, are a trial that failed.

    Args:
        on_progress: told after each validation.
    Raises:
        ValueError: the configuration as it stands cannot be trained, or something that is not of
            the trial's values, such as a full disk.
    """
    started_at = time.monotonic()
    ended = Trial(number, dict(values), "failed")
    try:
        one = trials.trial_config(config, number, values)
        metrics, monitor, epochs = _train(config, one, on_progress)
        if math.isfinite(metrics[monitor]):
            ended = dataclasses.replace(
                ended, state="done", metrics=metrics, monitor=monitor, epochs=epochs
            )
        else:
            ended = dataclasses.replace(ended, reason=f"valid {monitor} is {metrics[monitor]}")
    except TrainingError as error:
        ended = dataclasses.replace(ended, reason=str(error))
    except ValueError as error:
        # Subclasses are of the data and the disk; what does not fit together is a bare one.
        if number == 0 or type(error) not in (ValueError, ConfigError):
            raise
        ended = dataclasses.replace(ended, reason=str(error))
    return dataclasses.replace(ended, seconds=time.monotonic() - started_at)


def _train(
    config: RunConfig, trial: RunConfig, on_progress: Callable[[Progress], None] | None
) -> tuple[dict[str, float], str, int]:
    """Metrics of the best validation, which of them decides, and the epochs trained."""
    task = trials.settings(config).task
    num_epochs = trials.judged(trial, task).epochs

    def on_validation(told: Validated) -> None:
        if on_progress is not None:
            monitor, curve = told.monitor, told.curve
            best = max((e["metrics"] for e in curve), key=lambda m: goodness(monitor, m[monitor]))
            on_progress(Progress(curve[-1]["epoch"], num_epochs, monitor, best))

    if task == "pretrain":
        result = pipeline.pretrain(trial, on_validation=on_validation)
    else:
        _lay_pretraining(config, trial)
        if trial.pretrain is not None and not _shares_pretraining(config):
            pipeline.pretrain(trial)
        result = pipeline.finetune(trial, on_validation=on_validation)[task]["pretrained"]
    return result.metrics, str(result.values["monitor"]), int(result.values["curve"][-1]["epoch"])


def _shares_pretraining(config: RunConfig) -> bool:
    return config.pretrain is not None and trials.settings(config).shares_pretraining


def _lay_pretraining(config: RunConfig, trial: RunConfig) -> None:
    """Where trials share it, a trial's folder of pretraining is the run's own."""
    with joined_ranks() as ranks, raised_together():
        if not ranks.is_first:
            return
        place = trial.run_dir / "pretrain"
        if place.is_symlink():  # to be trained into only by the run itself
            place.unlink()
        if _shares_pretraining(config):
            if place.exists():
                checkpoint.move(place, place.with_name("pretrain.old"))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(Path("..", "..", "pretrain"))


def found(config: RunConfig, ended: Iterable[Trial]) -> Found:
    """
    Raises:
        TrainingError: no trial came to its end.
    """
    ordered = sorted(ended, key=lambda trial: trial.number)
    if trials.best_of(ordered) is None:
        first = next(trial for trial in ordered if trial.state == "failed")
        raise TrainingError(
            f"tune: none of {len(ordered)} trials came to its end; trial {first.number}: "
            f"{first.reason}"
        )
    return Found(ordered, trials.folder(config) / "best.toml")


def _spinner(console: Console | None, text: str) -> Any:
    return nullcontext() if console is None else console.status(text)
