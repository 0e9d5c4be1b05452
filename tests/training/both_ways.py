"""Small trainings by the plain loop and by the pipeline; run by one process or by torchrun.

python both_ways.py PREPARED CASES.json OUT.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from torchrec_pt import train
from torchrec_pt.build import build_task
from torchrec_pt.config import RunConfig, TrainConfig
from torchrec_pt.data.batch import Batch, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, gather_objects, joined_ranks
from torchrec_pt.learner import Learner
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.runs import StageResult
from torchrec_pt.stages import Stage, train_stage
from torchrec_pt.train import Trainer, TrainingError
from torchrec_pt.train_pipeline import TakenStep

WAYS = ("plain", "pipeline")
POISONED_STEP = 5


@contextlib.contextmanager
def going(way: str) -> Iterator[None]:
    """Every trainer that is built inside goes this way, on any device."""
    with patch.object(train, "suits_pipeline", lambda learner, device: way == "pipeline"):
        yield


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """What is so at every forward: the step, what was done and drawn before, rates and losses."""
    steps: list[dict[str, Any]] = []
    num_drawn = 0
    forward, draw = Trainer._forward, Learner.draw

    def records(self: Trainer, batch: Batch) -> tuple[Tensor, TakenStep]:
        num_done, looks_up = self.position.step, self.learner.backbone.items.collection.forward
        loss, taken = forward(self, batch)
        optimizers = (*self.optimizers.dense, self.optimizers.fused)
        steps.append(
            {
                "step": batch.step,
                "done": num_done,
                "drawn": num_drawn,
                "lookup": type(looks_up).__name__,
                "rates": [group["lr"] for o in optimizers for group in o.param_groups],
                "loss": loss.item(),
                "means": taken.means.tolist(),
            }
        )
        return loss, taken

    def counts(self: Learner, rows: Rows) -> Batch:
        nonlocal num_drawn
        num_drawn += 1
        return draw(self, rows)

    with patch.object(Trainer, "_forward", records), patch.object(Learner, "draw", counts):
        yield steps


@contextlib.contextmanager
def poisoned_on_the_last_rank() -> Iterator[None]:
    """One rank's mask vector becomes NaN before the forward of a step."""
    forward = Trainer._forward

    def poisons(self: Trainer, batch: Batch) -> tuple[Tensor, TakenStep]:
        if batch.step == POISONED_STEP and self.ranks.rank == self.ranks.world_size - 1:
            with torch.no_grad():
                self.learner.backbone.mask.fill_(torch.nan)
        return forward(self, batch)

    with patch.object(Trainer, "_forward", poisons):
        yield


def train_case(case: dict[str, Any], dataset: PreparedDataset, ranks: Ranks) -> StageResult:
    config = RunConfig.model_validate(case)
    settings: TrainConfig
    objectives: list[nn.Module]
    if config.finetune.tasks:
        ((task, settings),) = config.finetune.tasks.items()
        objectives = [build_task(config, task, dataset)]
    else:
        assert config.pretrain is not None
        settings = config.pretrain
        objectives = build_objectives(config, dataset)
    return train_stage(
        Stage(config, ranks, None),
        dataset,
        name="stage",
        folder="stage",
        train=settings,
        objectives=objectives,
        start_from=None,
    )


def _hashes(folder: Path) -> dict[str, str]:
    """Of every tensor in every checkpoint (the files name their tensors in any order)."""
    return {
        f"{file.relative_to(folder)}: {name}": hashlib.sha256(tensor.numpy()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def run(case: dict[str, Any], dataset: PreparedDataset, ranks: Ranks) -> dict[str, Any]:
    with recorded() as steps:
        result = train_case(case, dataset, ranks)
    losses = [step.pop("loss") for step in steps]  # each rank's own
    return {
        "steps": steps,
        "losses": gather_objects(losses),
        "curve": result.values["curve"],
        "checkpoints": _hashes(result.folder / "checkpoints"),
    }


def run_poisoned(case: dict[str, Any], dataset: PreparedDataset, ranks: Ranks) -> list[str]:
    """What each rank says."""
    try:
        with poisoned_on_the_last_rank():
            train_case(case, dataset, ranks)
    except TrainingError as error:
        return gather_objects(str(error))
    return []


def main(prepared: Path, cases: Path, out: Path) -> None:
    results: dict[str, Any] = {}
    with joined_ranks() as ranks:
        dataset = PreparedDataset.load(prepared, ranks)
        for name, case in json.loads(cases.read_text()).items():
            runs = run_poisoned if name == "poisoned" else run
            for way in WAYS:
                folder = cases.parent / f"{ranks.world_size} {way} {name}"
                with going(way):
                    results[f"{way} {name}"] = runs({**case, "run_dir": folder}, dataset, ranks)
        if ranks.is_first:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
