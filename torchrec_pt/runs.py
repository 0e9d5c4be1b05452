"""The folder of a run: one folder a stage, each with a result.json once it is finished.

<run_dir>/prepared/            the prepared dataset
<run_dir>/config.json          the resolved configuration
<run_dir>/pretrain/            checkpoints/, tensorboard/, plan.json, result.json; the model of
                               finetune.start_from where that takes the place of pretraining
<run_dir>/finetune/<task>/     pretrained/ and scratch/, each like pretrain/
<run_dir>/evaluate/            result.json; ranking.parquet and sampled_ranking.parquet (metrics of
                               each user), ctr.parquet and rating.parquet (each test interaction
                               with its predictions)
<run_dir>/evaluate/int8.json   what int8 tables make of each model, where that was asked
<run_dir>/export/              items and users, in the formats of [export], and of each file what it
                               is (<file>.json)
<run_dir>/model/               its models as programs (`programs.export`)
<run_dir>/report.html          all of it on one page
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_pt import checkpoint
from torchrec_pt.config import RunConfig, TaskConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.files import sha256, write_json
from torchrec_pt.placement import settle_optimizer

# Settings that the result of a stage does not depend on. What continue_from names is part of the
# fingerprint by its content.
_NOT_IN_FINGERPRINT = frozenset(
    {"control", "keep_checkpoints", "checkpoint_every", "async_checkpoints", "continue_from"}
)


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


# `finetune.start_from`: the other run's model becomes this run's pretrained one without a step.
TAKEN_OVER = TrainConfig(epochs=0)


def finished_stages(config: RunConfig, dataset: PreparedDataset) -> dict[str, StageResult]:
    """Folder -> result of every training stage that this configuration and data have done."""
    expected = stage_fingerprints(config, dataset)
    results = {folder: load_result(config.run_dir / folder) for folder in expected}
    return {
        folder: result
        for folder, result in results.items()
        if result is not None and result.fingerprint == expected[folder]
    }


def stage_fingerprints(config: RunConfig, dataset: PreparedDataset) -> dict[str, str]:
    """Folder -> fingerprint of every training stage of a run, done or not."""
    expected: dict[str, str] = {}
    if config.pretrain is not None:
        expected["pretrain"] = stage_fingerprint(config, dataset, config.pretrain, None)
    elif config.finetune.start_from is not None:
        expected["pretrain"] = stage_fingerprint(config, dataset, TAKEN_OVER, None)
    for task, train in config.finetune.tasks.items():
        start = expected.get("pretrain")
        control = stage_fingerprint(config, dataset, train.as_control, None)
        expected[f"finetune/{task}/pretrained"] = stage_fingerprint(config, dataset, train, start)
        expected[f"finetune/{task}/scratch"] = control
    return expected


def stage_fingerprint(
    config: RunConfig, dataset: PreparedDataset, train: TrainConfig, start: str | None
) -> str:
    """Names everything that a training stage's result depends on; `start`: where it starts from.

    The item table's optimizer is a part of it and its placement is not, so a stage goes on
    under another plan and on another number of ranks.

    Raises:
        ValueError: the setting that names another run's model names no checkpoint.
    """
    if not isinstance(train, TaskConfig):
        start = origin_digest(config)
    table = config.model.item_table
    parts = (
        dataset.manifest.fingerprint,
        config.model.digest(exclude=frozenset({"item_table"})),
        settle_optimizer(table, dataset.num_items, config.model.row_dim),
        table.learning_rate or train.learning_rate,
        train.digest(exclude=_NOT_IN_FINGERPRINT),
        config.seed,
        start,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def origin_digest(config: RunConfig) -> str | None:
    """Names the content of the checkpoint of another run that the pretrained model starts from.

    None where it starts from none. Once the stage is finished that checkpoint may go: result.json
    knows its digest.

    Raises:
        ValueError: no checkpoint there.
    """
    try:
        path = origin(config)
        return None if path is None else sha256(path / checkpoint.MARK)
    except ValueError:
        finished = load_result(config.run_dir / "pretrain")
        if finished is None or "origin" not in finished.values:
            raise
        return str(finished.values["origin"])


def origin(config: RunConfig) -> Path | None:
    """That checkpoint, which pretrain.continue_from or finetune.start_from names.

    Raises:
        ValueError: none there.
    """
    if config.pretrain is not None:
        path, key = config.pretrain.continue_from, "pretrain.continue_from"
    else:
        path, key = config.finetune.start_from, "finetune.start_from"
    if path is None:
        return None
    found = find_checkpoint(path)
    if found is None:
        raise ValueError(
            f"{key}: {path} holds no checkpoint; give the folder of a training stage "
            "(<run_dir>/pretrain), or of one of its checkpoints"
        )
    return found


def find_checkpoint(path: Path) -> Path | None:
    """Itself, of a stage the best or else the newest, or the newest of a folder of checkpoints."""
    candidates = [path]
    if (path / "checkpoints").is_dir():
        result = load_result(path)
        if result is not None:
            candidates.append(result.checkpoint)
        candidates += reversed(checkpoint.saved(path / "checkpoints"))
    candidates += reversed(checkpoint.saved(path))
    return next((one for one in candidates if (one / checkpoint.MARK).is_file()), None)


def find_run(path: Path) -> Path:
    """The folder of the run that `path` is, or lies in.

    Raises:
        ValueError: no run there.
    """
    for folder in (path, *path.resolve().parents):
        if (folder / "config.json").is_file():
            return folder
    raise _no_run(path)


def _no_run(path: Path) -> ValueError:
    return ValueError(f"{path}: holds no run; give the run_dir of a finished torchrec-pt run")


def load_run_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run, wherever its folder is now.

    Raises:
        ValueError: no run there.
    """
    try:
        config = RunConfig.model_validate_json((run_dir / "config.json").read_text())
    except (OSError, ValueError):
        raise _no_run(run_dir) from None
    return config.model_copy(update={"run_dir": run_dir})


def is_of_ranking(served: StageResult) -> bool:
    """Whether a served stage is the fine-tuned one, whose model has the ranking task's head."""
    return served.folder.name != "pretrain"


def served_stage(config: RunConfig, dataset: PreparedDataset) -> StageResult:
    """The stage whose model is served: fine-tuned for ranking, or else pretrained.

    Raises:
        ValueError: neither was trained from this configuration and data.
    """
    finished = finished_stages(config, dataset)
    for folder in ("finetune/ranking/pretrained", "pretrain"):
        if folder in finished:
            return finished[folder]
    raise ValueError(
        f"{config.run_dir}: holds no model trained from its configuration and data; "
        "run its pretrain stage first"
    )
