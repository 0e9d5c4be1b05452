"""Runs of pretraining that break off or go on; run by one process or by torchrun.

python resume.py CASES.json OUT.json
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.data.batch import Rows
from torchrec_pt.distributed import Ranks, joined_ranks, raised_together
from torchrec_pt.train import Trainer
from torchrec_pt.train_pipeline import TakenStep

Losses = list[tuple[int, list[float]]]


class BrokenOffError(Exception):
    """Instead of a step."""


def pretrain(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Every step with its losses, what was said, and the result unless it broke off.

    Args:
        case: "config"; "goes_on_from", the folder of a run to copy, or None; "dies_at", the step
            that fails on every rank, or None.
    """
    config = RunConfig.model_validate(case["config"])
    if case["goes_on_from"] is not None:
        with raised_together():
            if ranks.is_first:
                shutil.copytree(
                    Path(case["goes_on_from"]) / "pretrain", config.run_dir / "pretrain"
                )
    screen = io.StringIO()
    losses: Losses = []
    found: dict[str, Any] = {"losses": losses, "result": None}
    with _recorded(losses, case["dies_at"]):
        try:
            result = pipeline.pretrain(config, Console(file=screen, width=1000))
        except BrokenOffError:
            assert case["dies_at"] is not None
        else:
            found["result"] = {"fingerprint": result.fingerprint, **result.values}
    return {**found, "said": screen.getvalue()}


@contextlib.contextmanager
def _recorded(losses: Losses, dies_at: int | None) -> Iterator[None]:
    """Write down every step that a trainer takes, up to the one that fails."""
    step = Trainer.step

    def recorded(trainer: Trainer, *batches: Rows) -> TakenStep:
        number = trainer.position.step
        if number == dies_at:
            raise BrokenOffError
        taken = step(trainer, *batches)
        losses.append((number, taken.means.tolist()))
        return taken

    Trainer.step = recorded  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Trainer.step = step  # type: ignore[method-assign]


def main(cases: Path, out: Path) -> None:
    with joined_ranks() as ranks:
        results = {
            name: pretrain(case, ranks) for name, case in json.loads(cases.read_text()).items()
        }
        if ranks.is_first:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
