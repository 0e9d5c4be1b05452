"""The trials of a search: their configurations, their record, the best of them.

<run_dir>/tune/trial-000/      the configuration as it stands; trial-001/ and so on, each a run
<run_dir>/tune/trials.jsonl    one line a trial that ended
<run_dir>/tune/best.toml       the run with the values of the best trial, for `torchrec-pt run`
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w
from rich import box
from rich.console import Console
from rich.table import Table

from torchrec_pt import rng
from torchrec_pt.config import RunConfig, TrainConfig, TuneConfig
from torchrec_pt.config_file import ConfigError, with_values
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.files import whole_file
from torchrec_pt.metrics import goodness
from torchrec_pt.runs import stage_fingerprints

_SHOWN = 10  # rows of the table
_MAX_REPEATS = 1000  # draws in a row that were all drawn before: the space has no more


@dataclass(frozen=True)
class Trial:
    """One line of trials.jsonl.

    Attributes:
        number: 0 is the configuration as it stands.
        values: dotted key -> value; for number 0 what the configuration says, None where nothing.
        state: done; failed, as by a loss that is not finite, which counts as worst; or stopped by
            the search before its end.
        metrics: of the best validation; empty where it failed.
        monitor: the metric among them that decides.
        epochs: trained.
        reason: why it failed.
        fingerprint: of what is judged, with its data; "" where the values do not go together.
    """

    number: int
    values: dict[str, Any]
    state: Literal["done", "failed", "stopped"]
    monitor: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0
    reason: str = ""
    fingerprint: str = ""

    @property
    def score(self) -> float:
        """Larger is better."""
        if self.state == "failed":
            return float("-inf")
        return goodness(self.monitor, self.metrics[self.monitor])


# --- what is tried ------------------------------------------------------------------------------


def settings(config: RunConfig) -> TuneConfig:
    """
    Raises:
        ValueError: no [tune] section.
    """
    if config.tune is None:
        raise ValueError("tune: no space to search is given; add [tune] and [tune.space]")
    return config.tune


def folder(config: RunConfig) -> Path:
    return config.run_dir / "tune"


def trials_to_run(config: RunConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and values of each trial: the configuration as it stands, then random draws.

    A draw is a function of `tune.seed` and the draws before it, none is tried twice, and a space
    with fewer values than trials ends the search.
    """
    tune = settings(config)
    first = current_values(config)
    yield 0, first
    tried, repeats, number = {_key(first)}, 0, 1
    for draw in itertools.count():
        if number == tune.num_trials or repeats == _MAX_REPEATS:
            return
        values = {key: domain.at(_unit(tune.seed, draw, key)) for key, domain in tune.space.items()}
        if _key(values) in tried:
            repeats += 1
            continue
        tried.add(_key(values))
        yield number, values
        repeats, number = 0, number + 1


def _unit(seed: int, draw: int, key: str) -> float:
    """Uniform in [0, 1)."""
    return (rng.key(seed, "tune", draw, key) + 2**63) / 2**64 * (1 - 2**-53)


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def current_values(config: RunConfig) -> dict[str, Any]:
    """What the configuration has at the keys of the space; None where it has nothing."""
    resolved = config.model_dump(mode="json")
    values = {}
    for dotted in settings(config).space:
        node: Any = resolved
        for key in dotted.split("."):
            if isinstance(node, list):
                node = node[int(key)]
            else:
                node = node.get(key) if isinstance(node, dict) else None
        values[dotted] = node
    return values


def trial_config(config: RunConfig, number: int, values: Mapping[str, Any]) -> RunConfig:
    """A run of its own over the same prepared data, of the judged task alone, without a control.

    Raises:
        ConfigError: the values do not go together.
    """
    tune = settings(config)
    changed = with_values(config, values if number else {})
    tasks = dict.fromkeys(changed.finetune.tasks)
    if tune.task != "pretrain":
        task = changed.finetune.tasks[tune.task]
        tasks = {**tasks, tune.task: task.model_copy(update={"control": None})}
    return changed.model_copy(
        update={
            "run_dir": folder(config) / f"trial-{number:03}",
            "data": config.data.model_copy(update={"prepared": config.prepared_dir}),
            "finetune": changed.finetune.model_copy(update=tasks),
        }
    )


def judged(config: RunConfig, task: str) -> TrainConfig:
    """The section of the stage that a trial is judged by."""
    train = config.pretrain if task == "pretrain" else config.finetune.tasks[task]
    assert train is not None
    return train


def fingerprint(
    config: RunConfig, dataset: PreparedDataset, number: int, values: Mapping[str, Any]
) -> str:
    """Names everything that a trial's result depends on; "" where its values do not go together."""
    try:
        trial = trial_config(config, number, values)
    except ConfigError:
        return ""
    task = settings(config).task
    stage = "pretrain" if task == "pretrain" else f"finetune/{task}/pretrained"
    return stage_fingerprints(trial, dataset)[stage]


# --- what came of it ----------------------------------------------------------------------------


def read_trials(config: RunConfig, dataset: PreparedDataset) -> dict[int, Trial]:
    """Number -> trial of this configuration, space and data that ended before.

    Raises:
        ValueError: a damaged file.
    """
    path = folder(config) / "trials.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    try:
        trials = [Trial(**json.loads(line)) for line in lines]
    except (TypeError, ValueError):
        raise ValueError(f"{path}: is no record of trials; move it away") from None
    tune = settings(config)
    return {
        trial.number: trial
        for trial in trials
        if trial.number < tune.num_trials
        and trial.values.keys() == tune.space.keys()
        and trial.fingerprint == fingerprint(config, dataset, trial.number, trial.values)
        and (
            trial.number == 0
            or all(domain.contains(trial.values[key]) for key, domain in tune.space.items())
        )
    }


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The first with the best score among those that were trained to their end."""
    done = [trial for trial in trials if trial.state == "done"]
    return max(done, key=lambda trial: (trial.score, -trial.number), default=None)


def write_trials(config: RunConfig, trials: Iterable[Trial]) -> None:
    """trials.jsonl, and best.toml where one is done.

    Raises:
        WriteError: no space, no permission.
    """
    ordered = sorted(trials, key=lambda trial: trial.number)
    with whole_file(folder(config) / "trials.jsonl") as partial:
        partial.write_text("".join(f"{json.dumps(asdict(trial))}\n" for trial in ordered))
    best = best_of(ordered)
    if best is not None:
        with whole_file(folder(config) / "best.toml") as partial:
            partial.write_text(_best_toml(config, best, ordered), encoding="utf-8")


def _best_toml(config: RunConfig, best: Trial, trials: Sequence[Trial]) -> str:
    changed = with_values(config, best.values if best.number else {})
    reached = f"valid {best.monitor} {best.metrics[best.monitor]:.4f}"
    first = next((trial for trial in trials if trial.number == 0 and trial.metrics), None)
    if first is not None and best.number:
        reached += f", {first.metrics[first.monitor]:.4f} as it stood"
    values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in best.values.items())
    said = values if best.number else "the configuration as it stood"
    return (
        f"# The best of {len(trials)} trials for {settings(config).task} in {folder(config)}, "
        f"number {best.number}: {reached}.\n"
        f"# {said}\n"
        "# Chosen on the validation split, which flatters the figure; test was not looked at.\n"
        + tomli_w.dumps(changed.model_dump(mode="json", exclude_unset=True))
    )


def in_words(trial: Trial, ended: Iterable[Trial], num_trials: int) -> str:
    """One line about a trial that ended, the last of `ended`."""
    names = short_names(trial.values)
    values = ", ".join(f"{names[key]} {in_cell(value)}" for key, value in trial.values.items())
    came = f"failed, {trial.reason}"
    if trial.state != "failed":
        came = f"valid {trial.monitor} {trial.metrics[trial.monitor]:.4f}"
        came += " (best so far)" if trial == best_of(ended) else ""
    if trial.state == "stopped":
        came += f", stopped after epoch {trial.epochs}"
    return f"trial {trial.number} of {num_trials}: {came}; {values}; {trial.seconds:.0f} s"


def print_trials(trials: Sequence[Trial], console: Console) -> None:
    """The best of them with their values."""
    ranked = sorted(
        trials, key=lambda trial: (trial.state == "done", trial.score, -trial.number), reverse=True
    )
    shown = ranked[:_SHOWN]
    names = short_names(ranked[0].values)
    title = f"The best {len(shown)} of {len(trials)} trials, on the validation split"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    monitor = next((trial.monitor for trial in ranked if trial.monitor), "")
    for name in ("trial", monitor, *names.values(), "epochs"):
        table.add_column(name, justify="right")
    for trial in shown:
        value = f"{trial.metrics[monitor]:.4f}" if trial.metrics else "failed"
        values = [in_cell(trial.values[key]) for key in names]
        epochs = f"{trial.epochs}{', stopped' if trial.state == 'stopped' else ''}"
        number = f"{trial.number}" if trial.number else "as it stands"
        table.add_row(number, value, *values, epochs)
    console.print(table)


def short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> its last words, as many as tell it from the others."""
    names = {}
    for key in keys:
        words = key.split(".")
        for num in range(1, len(words) + 1):
            names[key] = ".".join(words[-num:])
            if sum(f".{other}".endswith(f".{names[key]}") for other in keys) == 1:
                break
    return names


def in_cell(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
