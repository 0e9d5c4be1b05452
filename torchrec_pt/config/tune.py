"""What a search tries: the keys, their values, and by what a trial is judged."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from torchrec_pt.config.section import Section


class Domain(Section):
    """The values of one key: `choices`, or a range from `low` to `high`, both included.

    A range is of floats, or of whole numbers where `integer` says so; with `step` it holds low,
    low + step, … alone, and with `log` small values are as likely as large ones, octave for octave.
    """

    choices: tuple[Any, ...] | None = Field(None, min_length=1)
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = Field(None, gt=0)
    integer: bool = False

    @model_validator(mode="after")
    def _is_choices_or_range(self) -> Domain:
        if self.choices is not None:
            if (self.low, self.high, self.step) != (None, None, None) or self.log or self.integer:
                raise ValueError("choices stand alone; leave low, high, log, step and integer out")
            return self
        if self.low is None or self.high is None:
            raise ValueError("needs choices = [...], or both low and high")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low ({self.low:g}) must be smaller than high ({self.high:g})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log wants low above 0 and no step; leave log out, or mend that")
        ends = (self.low, self.high, self.step or 1.0)
        if self.integer and not all(end.is_integer() for end in ends):
            raise ValueError("integer wants low, high and step to be whole numbers")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """The ends of a range; with a step the last value that it reaches."""
        assert self.low is not None
        assert self.high is not None
        step = self.stride
        return self.low, self.high if step is None else self.low + step * (self._num_steps - 1)

    @property
    def stride(self) -> float | None:
        """Between two values of a range; None where there are any between low and high."""
        return 1.0 if self.step is None and self.integer and not self.log else self.step

    @property
    def _num_steps(self) -> int:
        assert self.low is not None
        assert self.high is not None
        return int((self.high - self.low) / (self.stride or 1.0) + 1e-9) + 1

    def at(self, u: float) -> Any:
        """The value at u in [0, 1), such that a uniform u draws from the domain."""
        if self.choices is not None:
            return self.choices[int(u * len(self.choices))]
        low, high = self.range
        if self.stride is not None:
            return self.settle(low + self.stride * int(u * self._num_steps))
        if self.log:
            return self.settle(math.exp(math.log(low) + u * (math.log(high) - math.log(low))))
        return self.settle(low + u * (high - low))

    def settle(self, x: float) -> float:
        """A number of a range as it is used and shown: whole, or of four digits without a step."""
        low, high = self.range
        digits = 4 if self.stride is None else 12
        x = min(max(float(f"{x:.{digits}g}"), low), high)
        return round(x) if self.integer else x

    def contains(self, value: Any) -> bool:
        """Whether `at` could give the value."""
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.range
        if (self.integer and value != round(value)) or not low <= value <= high:
            return False
        places = (value - low) / (self.stride or 1.0)
        return self.stride is None or abs(places - round(places)) < 1e-8

    @property
    def examples(self) -> tuple[Any, ...]:
        """The choices, or of a range its ends and, with a step, the value after the first."""
        if self.choices is not None:
            return self.choices
        low, high = self.range
        second = () if self.stride is None else (self.settle(low + self.stride),)
        return (self.settle(low), *second, self.settle(high))


class TuneConfig(Section):
    """A search for the values of some keys that do best on validation.

    `space`: dotted key, as in --set, -> domain. A trial changes the model and how it trains, never
    the data, so that all trials are judged on the same validation split.
    """

    task: Literal["pretrain", "ctr", "ranking", "rating"] = Field(
        description="a trial is judged by what this stage reaches on validation"
    )
    num_trials: int = Field(20, ge=1, description="the first is the configuration as it stands")
    seed: int = Field(0, ge=0, lt=2**32, description="of the values drawn")
    grace_epochs: int = Field(
        1, ge=1, description="cluster.tune: epochs of a trial before it may be stopped"
    )
    space: dict[str, Domain] = Field(min_length=1)

    @field_validator("space", mode="before")
    @classmethod
    def _keys_are_dotted(cls, value: Any) -> Any:
        """TOML reads an unquoted a.b = { … } as tables in tables."""
        return _dotted(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _keys_reach_what_is_judged(self) -> TuneConfig:
        sections = ["model", "pretrain"]
        if self.task != "pretrain":
            sections.append(f"finetune.{self.task}")
        for key in self.space:
            if not any(key.startswith(f"{section}.") for section in sections):
                raise ValueError(
                    f'space: with task = "{self.task}" a trial changes keys of '
                    f"{', '.join(sections)}; given {key}; leave it out"
                )
        for key, other in permutations(self.space, 2):
            if other.startswith(f"{key}."):
                raise ValueError(f"space: {other} lies within {key}; leave one of them out")
        return self

    @property
    def shares_pretraining(self) -> bool:
        """Whether every trial starts from the same pretrained model."""
        return all(key.startswith("finetune.") for key in self.space)


def _dotted(tables: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            flat |= {f"{key}.{inner}": domain for inner, domain in _dotted(value).items()}
        else:
            flat[key] = value
    return flat
