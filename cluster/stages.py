"""The pipeline of a run as a graph: what each stage needs, which may start now, how it all ended.

    prepare -> pretrain -> finetune:ctr, finetune:ranking, finetune:rating -> evaluate

What `finetune.start_from` names takes the place of pretraining. The last stage judges what is
finished, exports the served model and writes the report. Nothing here knows of Ray.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchrec_pt.config import RunConfig

PREPARE, PRETRAIN, FINETUNE, EVALUATE = "prepare", "pretrain", "finetune", "evaluate"


@dataclass(frozen=True)
class Stage:
    """Attributes:
    kind: one of the constants above.
    task: what a stage of fine-tuning is for.
    needs: names of stages without which this one cannot be.
    after: names of stages that must have ended, whatever came of them.
    """

    kind: str
    task: str = ""
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.task}" if self.task else self.kind

    @property
    def slug(self) -> str:
        """The name as a part of file names."""
        return self.name.replace(":", "-")

    @property
    def reads(self) -> list[str]:
        """Folders of a run that the stage starts from, its own earlier state among them."""
        if self.kind == EVALUATE:
            return ["prepared", "pretrain", "finetune", "evaluate"]
        inputs = {PREPARE: [], PRETRAIN: ["prepared"], FINETUNE: ["prepared", "pretrain"]}
        return [*inputs[self.kind], *self.writes]

    @property
    def writes(self) -> list[str]:
        """Folders of a run that the stage leaves something in."""
        if self.kind == FINETUNE:
            return [f"finetune/{self.task}"]
        if self.kind == EVALUATE:
            return ["evaluate", "export", ""]  # the report stands beside the folders
        return ["prepared" if self.kind == PREPARE else self.kind]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        message: one line about what failed, or why it was skipped.
        exit_code: that of torchrec-pt for the same end.
    """

    state: Literal["done", "failed", "skipped"]
    message: str = ""
    exit_code: int = 0
    seconds: float = 0.0


Outcomes = Mapping[str, Outcome]  # by the names of the stages


def stages_of(config: RunConfig) -> list[Stage]:
    """Every stage of a run; what one needs stands before it."""
    tasks = [Stage(FINETUNE, task, needs=(PRETRAIN,)) for task in config.finetune.tasks]
    return [
        Stage(PREPARE),
        Stage(PRETRAIN, needs=(PREPARE,)),
        *tasks,
        Stage(EVALUATE, needs=(PRETRAIN,), after=tuple(stage.name for stage in tasks)),
    ]


def ready(stages: Iterable[Stage], begun: Collection[str], ended: Outcomes) -> list[Stage]:
    """Stages that may start now, in their order; `begun`: those that have, ended or not."""
    done = {name for name, outcome in ended.items() if outcome.state == "done"}
    return [
        stage
        for stage in stages
        if stage.name not in begun
        and stage.name not in ended
        and done.issuperset(stage.needs)
        and ended.keys() >= set(stage.after)
    ]


def skipped(stages: Iterable[Stage], ended: Outcomes) -> dict[str, Outcome]:
    """Stages that will never start, since one that they need did not come to its end."""
    found: dict[str, Outcome] = {}
    for stage in stages:
        known = {**ended, **found}
        missing = [n for n in stage.needs if n in known and known[n].state != "done"]
        if stage.name not in ended and missing:
            found[stage.name] = Outcome("skipped", f"needs {', '.join(missing)}")
    return found


def finished_tasks(ended: Outcomes) -> tuple[str, ...]:
    """Tasks that a model was fine-tuned for."""
    names = [name for name, outcome in ended.items() if outcome.state == "done"]
    return tuple(n.partition(":")[2] for n in names if n.startswith(f"{FINETUNE}:"))


def exit_code(stages: Sequence[Stage], ended: Outcomes) -> int:
    """0: every stage is done. 1: the run has its tables, but not all that was asked for.

    Else that of the failure for which nothing could be judged.
    """
    failed = [ended[stage.name] for stage in stages if ended[stage.name].state == "failed"]
    if not failed:
        return 0
    return 1 if ended[EVALUATE].state == "done" else failed[0].exit_code
