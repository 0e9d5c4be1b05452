"""A run broken off on N ranks under one plan goes on under another on M, as if never broken off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.conftest import FEATURES, tiny_config
from tests.training.resume import pretrain
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks

WORKER = Path(__file__).parent / "resume.py"

# 37 users in batches of 10: 4 steps an epoch. A run goes on from a checkpoint two steps into its
# second epoch, and, where it breaks off again, from one a step into its third.
STEPS: dict[str, Any] = {
    "epochs": 6,
    "batch_size": 10,
    "warmup_steps": 4,
    "patience": 2,
    "checkpoint_every": 3,
}
DIES_AT, GOES_ON_AT = (7, 10), (6, 9)

TRANSFORMER = {"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0.2}
TWO_TOWER = {"backbone": "two_tower", "dim": 16, "hidden_dims": [8], "max_length": 8}
MASKED = {"name": "masked_item", "negatives": {"num": 13, "shared": True}}
NEXT = {"name": "next_item", "negatives": {"num": 7}}
VIEWS = {"name": "contrastive", "weight": 0.5, "learn_temperature": True}
PAIRS = {**VIEWS, "pairs": "user_item", "negatives": {"num": 11}}


class Workload(NamedTuple):
    """What one optimizer of the item table trains; its key begins with the optimizer.

    Attributes:
        rates: of the stage and of the item table. They are so high that validation is best after
            the first epoch, before the break, and patience ends the run; but those of `adamw`.
        num_steps: until it ends.
        train: what is different from `STEPS`.
    """

    model: dict[str, Any]
    objectives: list[dict[str, Any]]
    rates: tuple[float, float]
    schedule: str
    num_steps: int
    train: Mapping[str, Any] = {}


WORKLOADS = {
    "adagrad": Workload(TRANSFORMER, [MASKED, VIEWS], (0.02, 0.2), "cosine", 12),
    "sgd": Workload(TRANSFORMER, [MASKED, VIEWS], (0.05, 0.5), "cosine", 12),
    "rowwise_adagrad": Workload(TWO_TOWER, [PAIRS], (0.1, 1.0), "linear", 12),
    "adamw": Workload(
        {**TRANSFORMER, "attention": "causal"}, [NEXT, PAIRS], (0.01, 0.01), "linear", 24
    ),
    # Steps of two batches each, and an average of the weights
    "adamw, averaged": Workload(
        {**TRANSFORMER, "attention": "causal"},
        [NEXT, PAIRS],
        (0.01, 0.01),
        "linear",
        24,
        {"batch_size": 5, "accumulate_steps": 2, "average_decay": 0.6, "patience": None},
    ),
}


class Plan(NamedTuple):
    num_ranks: int
    placement: str

    def __str__(self) -> str:
        return f"{self.num_ranks} {self.placement}"


class Run(NamedTuple):
    """A run under one plan after the other: broken off under each but the last.

    Attributes:
        is_broken_off: under the last as well; others go on from it.
    """

    optimizer: str
    plans: tuple[Plan, ...]
    is_broken_off: bool = False

    def __str__(self) -> str:
        return f"{self.optimizer}, " + " to ".join(map(str, self.plans))

    @property
    def source(self) -> Run | None:
        """What it goes on from."""
        before = self.plans[:-1]
        return Run(self.optimizer, before, is_broken_off=True) if before else None

    @property
    def folder(self) -> str:
        return f"{self}, broken off" if self.is_broken_off else str(self)


def _run(optimizer: str, *plans: tuple[int, str]) -> Run:
    return Run(optimizer, tuple(Plan(*plan) for plan in plans))


WHOLE = {optimizer: _run(optimizer, (1, "replicated")) for optimizer in WORKLOADS}
RESUMED = [
    _run("adagrad", (1, "replicated"), (2, "row_wise")),
    _run("adagrad", (1, "row_wise"), (3, "column_wise")),
    _run("adagrad", (2, "column_wise"), (3, "table_wise")),
    _run("adagrad", (2, "table_wise"), (1, "column_wise")),
    _run("adagrad", (3, "row_wise"), (2, "replicated")),
    _run("adagrad", (3, "column_wise"), (1, "row_wise")),
    _run("adagrad", (1, "table_wise"), (3, "row_wise"), (2, "column_wise")),
    _run("sgd", (3, "table_wise"), (2, "column_wise")),
    _run("sgd", (1, "column_wise"), (2, "table_wise")),
    _run("rowwise_adagrad", (2, "row_wise"), (3, "replicated")),
    _run("rowwise_adagrad", (3, "replicated"), (1, "table_wise")),
    _run("adamw", (1, "replicated"), (3, "replicated")),
    _run("adamw", (3, "replicated"), (2, "replicated")),
    _run("adamw, averaged", (1, "replicated"), (2, "replicated")),
    _run("adamw, averaged", (3, "replicated"), (1, "replicated")),
]
EVERY_PLAN = [
    Plan(num_ranks, placement)
    for num_ranks in (1, 2, 3)
    for placement in ("replicated", "table_wise", "row_wise", "column_wise")
]
EVERY_PAIR = [_run("adagrad", source, target) for source in EVERY_PLAN for target in EVERY_PLAN]
# Numbers of ranks, launched in turn: a run goes on from one of an earlier launch or of its own.
LAUNCHES = (1, 2, 3, 2, 1)

Results = Mapping[Run, dict[str, Any]]


def _case(run: Run, folder: Path, prepared: Path) -> dict[str, Any]:
    workload = WORKLOADS[run.optimizer]
    rate, table_rate = workload.rates
    table = {
        "placement": run.plans[-1].placement,
        "optimizer": run.optimizer.split(",")[0],
        "learning_rate": table_rate,
    }
    data = tiny_config(prepared.parent, FEATURES).data
    config = tiny_config(
        folder,
        run_dir=folder / run.folder,
        data={**data.model_dump(), "prepared": prepared},
        model={**workload.model, "item_table": table},
        pretrain={
            **STEPS,
            **workload.train,
            "learning_rate": rate,
            "schedule": workload.schedule,
            "objectives": workload.objectives,
        },
    )
    return {
        "config": config.model_dump(mode="json"),
        "goes_on_from": None if run.source is None else str(folder / run.source.folder),
        "dies_at": DIES_AT[len(run.plans) - 1] if run.is_broken_off else None,
    }


def _do(runs: Sequence[Run], prepared: Path, folder: Path) -> Results:
    """Do the runs, and first what they go on from."""
    left = list(dict.fromkeys(run for wanted in runs for run in _with_sources(wanted)))
    left.sort(key=lambda run: len(run.plans))
    done: dict[Run, dict[str, Any]] = {}
    for index, num_ranks in enumerate(LAUNCHES):
        now: list[Run] = []
        for run in left:
            is_ready = run.source is None or run.source in done or run.source in now
            if run.plans[-1].num_ranks == num_ranks and is_ready:
                now.append(run)
        left = [run for run in left if run not in now]
        cases = {run.folder: _case(run, folder, prepared) for run in now}
        got = _launch(num_ranks, cases, folder / f"launch-{index}")
        done |= {run: got[run.folder] for run in now}
    assert not left
    return done


def _with_sources(run: Run) -> list[Run]:
    return [run] if run.source is None else [*_with_sources(run.source), run]


def _launch(num_ranks: int, cases: dict[str, Any], path: Path) -> dict[str, Any]:
    if num_ranks == 1:  # saves the time to import torch
        with joined_ranks() as ranks:
            return {name: pretrain(case, ranks) for name, case in cases.items()}
    asked, out = path.with_suffix(".json"), path.with_suffix(".out.json")
    asked.write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    command = [sys.executable, *launcher, str(WORKER), str(asked), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def results(cycle_with_features: PreparedDataset, folder: Path) -> Results:
    return _do([*WHOLE.values(), *RESUMED], cycle_with_features.path, folder)


@pytest.fixture(scope="module")
def every_pair(
    cycle_with_features: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Results, Path]:
    folder = tmp_path_factory.mktemp("every_pair")
    runs = [WHOLE["adagrad"], *EVERY_PAIR]
    return _do(runs, cycle_with_features.path, folder), folder


def _assert_goes_on_as_if_never_broken_off(results: Results, run: Run, folder: Path) -> None:
    whole, rest = results[WHOLE[run.optimizer]], results[run]
    first = GOES_ON_AT[len(run.plans) - 2]
    assert "resumed at epoch" in rest["said"]
    assert [step for step, _ in rest["losses"]] == list(range(first, len(whole["losses"])))
    expected = [means for _, means in whole["losses"][first:]]
    np.testing.assert_allclose([means for _, means in rest["losses"]], expected, rtol=1e-5)

    expected, result = whole["result"], rest["result"]
    assert result["fingerprint"] == expected["fingerprint"]
    assert result["checkpoint"] == expected["checkpoint"]
    stage = folder / run.folder / "pretrain"
    assert (stage / result["checkpoint"]).is_dir()
    assert len(result["curve"]) == len(expected["curve"])
    for ours, theirs in zip(result["curve"], expected["curve"], strict=True):
        assert (ours["epoch"], ours["step"]) == (theirs["epoch"], theirs["step"])
        for what in ("losses", "metrics"):
            assert ours[what] == pytest.approx(theirs[what], rel=1e-5)

    plans = {plan["table"]: plan for plan in json.loads((stage / "plan.json").read_text())}
    num_ranks, placement = run.plans[-1]
    assert plans["item"]["kind"] == placement
    assert len(plans["item"]["bytes_per_rank"]) == num_ranks


@pytest.mark.parametrize("run", RESUMED, ids=str)
def test_a_run_goes_on_under_another_plan_as_if_never_broken_off(
    results: Results, folder: Path, run: Run
) -> None:
    _assert_goes_on_as_if_never_broken_off(results, run, folder)


@pytest.mark.soak
@pytest.mark.parametrize("run", EVERY_PAIR, ids=str)
def test_a_run_goes_on_from_every_plan_under_every_plan(
    every_pair: tuple[Results, Path], run: Run
) -> None:
    _assert_goes_on_as_if_never_broken_off(every_pair[0], run, every_pair[1])


@pytest.mark.parametrize(
    "optimizer", [n for n, w in WORKLOADS.items() if "patience" not in w.train]
)
def test_patience_ends_a_run_by_a_validation_from_before_the_break(
    results: Results, optimizer: str
) -> None:
    """Else the tests above would prove less."""
    run = results[WHOLE[optimizer]]
    num_steps = WORKLOADS[optimizer].num_steps
    assert [step for step, _ in run["losses"]] == list(range(num_steps))
    assert "resumed" not in run["said"]
    curve = [entry["metrics"]["ndcg@10"] for entry in run["result"]["curve"]]
    if optimizer == "adamw":
        assert curve.index(max(curve)) >= len(curve) - STEPS["patience"]
    else:
        assert curve.index(max(curve)) == 1
