"""The folder of a run: one folder a stage, each with a result.json once it is finished.

<run_dir>/prepared/            the prepared dataset
<run_dir>/config.json          the resolved configuration
<run_dir>/pretrain/            checkpoints/, tensorboard/, result.json
<run_dir>/finetune/<task>/     pretrained/ and scratch/, each like pretrain/
<run_dir>/evaluate/            result.json; ranking.parquet (metrics of each user), ctr.parquet and
                               rating.parquet (each test interaction with its predictions)
<run_dir>/export/              items and users, .parquet or .npy
<run_dir>/report.html          all of it on one page
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_pt.config import RunConfig
from torchrec_pt.files import write_json


@dataclass(frozen=True)
class StageResult:
    """What a finished stage left.

    Attributes:
        fingerprint: of the configuration and inputs that it was made from.
        values: metrics, paths and the like, as JSON holds them.
    """

    folder: Path
    fingerprint: str
    values: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The best checkpoint of a training stage."""
        return self.folder / str(self.values["checkpoint"])

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.values["metrics"])

    def save(self) -> StageResult:
        write_json(self.folder / "result.json", {"fingerprint": self.fingerprint, **self.values})
        return self


def load_result(folder: Path) -> StageResult | None:
    """The result of a finished stage, or None."""
    try:
        values = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return StageResult(folder, values.pop("fingerprint"), values)


@dataclass(frozen=True)
class Run:
    """A run with at least one trained model.

    Attributes:
        serving: the stage whose model is served: fine-tuned, or else pretrained.
    """

    config: RunConfig
    serving: StageResult


def load_run(run_dir: Path) -> Run:
    """Read what a run left.

    Raises:
        ValueError: no run, or one without a trained model.
    """
    try:
        config = RunConfig.model_validate_json((run_dir / "config.json").read_text())
    except (OSError, ValueError):
        raise ValueError(
            f"{run_dir}: holds no run; give the run_dir of a finished torchrec-pt run"
        ) from None
    for folder in (run_dir / "finetune/ranking/pretrained", run_dir / "pretrain"):
        serving = load_result(folder)
        if serving is not None:
            return Run(config, serving)
    raise ValueError(f"{run_dir}: holds no trained model yet; run its pretrain stage first")
