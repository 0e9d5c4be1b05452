"""What Ray Tune tries next: the configuration as it stands, then what Optuna proposes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from torchrec_pt import rng
from torchrec_pt.config import Domain, RunConfig
from torchrec_pt.trials import Trial, current_values, settings

# What a trial reports: larger is better.
SCORE = "score"


class Proposals(Searcher):
    """Values by a tree-structured Parzen estimator (TPE; Bergstra et al. 2011), seeded.

    A proposal is {"number": the trial's, "values": dotted key -> value}. Trials that ended before
    are not proposed again, and the estimator knows them.
    """

    def __init__(self, config: RunConfig, ended: Mapping[int, Trial]) -> None:
        super().__init__(metric=SCORE, mode="max")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        tune = settings(config)
        self._space = tune.space
        self._as_it_stands = current_values(config)
        self._first_id = ""
        self.waiting = [number for number in range(tune.num_trials) if number not in ended]
        self._optuna = OptunaSearch(
            {key: distribution(domain) for key, domain in tune.space.items()},
            metric=SCORE,
            mode="max",
            # The same seed would begin with the values of the trials that ended.
            seed=rng.key(tune.seed, "optuna", len(ended)) % 2**32,
        )
        for trial in ended.values():
            self._tell(trial.values, trial.score)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        number = self.waiting.pop(0)
        if number == 0:
            self._first_id = trial_id
            return {"number": 0, "values": self._as_it_stands}
        proposed = self._optuna.suggest(trial_id)
        assert proposed is not None
        values = {key: _value(domain, proposed[key]) for key, domain in self._space.items()}
        return {"number": number, "values": values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id != self._first_id:
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id != self._first_id:
            self._optuna.on_trial_complete(trial_id, result, error)
        elif result is not None and not error:
            self._tell(self._as_it_stands, result[SCORE])

    def _tell(self, values: Mapping[str, Any], score: float) -> None:
        """The configuration as it stands may lie outside of the space; then there is no telling."""
        if all(domain.contains(values[key]) for key, domain in self._space.items()):
            known = {key: _parameter(domain, values[key]) for key, domain in self._space.items()}
            self._optuna.add_evaluated_point(known, score)

    def save(self, checkpoint_path: str) -> None:
        self._optuna.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        self._optuna.restore(checkpoint_path)


def distribution(domain: Domain) -> BaseDistribution:
    """Choices go by their number, since Optuna knows no lists and tables."""
    if domain.choices is not None:
        return CategoricalDistribution(range(len(domain.choices)))
    low, high = domain.range
    if domain.integer:
        step = 1 if domain.stride is None else int(domain.stride)
        return IntDistribution(int(low), int(high), log=domain.log, step=step)
    return FloatDistribution(low, high, log=domain.log, step=domain.stride)


def _value(domain: Domain, parameter: Any) -> Any:
    return domain.settle(parameter) if domain.choices is None else domain.choices[parameter]


def _parameter(domain: Domain, value: Any) -> Any:
    return value if domain.choices is None else domain.choices.index(value)
