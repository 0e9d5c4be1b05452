"""Training stops, resumes and repeats as it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.train import Trainer, TrainingError

OBJECTIVES = [{"name": "masked_item"}, {"name": "contrastive", "weight": 0.1}]


def _config(
    cycle_folder: Path, run_dir: Path, table: dict[str, Any] | None = None, epochs: int = 4
) -> RunConfig:
    model = {"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0.2}
    pretrain = {"epochs": epochs, "batch_size": 10, "warmup_steps": 3, "objectives": OBJECTIVES}
    config = tiny_config(
        cycle_folder, model={**model, "item_table": table or {}}, pretrain=pretrain
    )
    return config.model_copy(update={"run_dir": run_dir})


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("dies_at", [2, 10], ids=["first epoch", "third epoch"])
@pytest.mark.parametrize(
    "table",
    [{"placement": "replicated"}, {"placement": "row_wise", "optimizer": "rowwise_adagrad"}],
    ids=["adamw", "rowwise_adagrad"],
)
def test_a_killed_stage_resumes_and_ends_as_the_uninterrupted_one(
    cycle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: dict[str, Any],
    dies_at: int,
) -> None:
    whole, broken = (_config(cycle_folder, tmp_path / name, table) for name in ("a", "b"))
    pipeline.prepare(whole)
    shutil.copytree(whole.prepared_dir, broken.prepared_dir)
    expected = pipeline.pretrain(whole)

    step = Trainer.step
    steps = 0

    def dies(self: Trainer, rows: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == dies_at:  # of 4 an epoch
            raise _KilledError
        return step(self, rows)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(_KilledError):
        pipeline.pretrain(broken)
    monkeypatch.undo()
    resumed = pipeline.pretrain(broken)

    # Bit for bit: the same machine, the same process, the same order of sums.
    assert resumed.values["curve"] == expected.values["curve"]
    assert resumed.metrics == expected.metrics


def test_one_seed_gives_one_result_and_another_seed_another(
    cycle_folder: Path, tmp_path: Path
) -> None:
    first, second = (_config(cycle_folder, tmp_path / name, epochs=2) for name in ("a", "b"))
    other = _config(cycle_folder, tmp_path / "c", epochs=2).model_copy(update={"seed": 1})
    curves = []
    for config in (first, second, other):
        pipeline.prepare(config)
        curves.append(pipeline.pretrain(config).values["curve"])
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_a_finished_stage_is_not_done_again_unless_its_configuration_changed(
    cycle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(cycle_folder, tmp_path, epochs=1)
    pipeline.prepare(config)
    first = pipeline.pretrain(config)
    steps: list[Any] = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, rows: steps.append(rows) or step(self, rows))
    assert pipeline.pretrain(config).values == first.values
    assert not steps
    pipeline.pretrain(_config(cycle_folder, tmp_path, epochs=2))
    assert len(steps) == 2 * 4


def test_a_loss_that_is_not_finite_names_step_items_and_checkpoint(
    cycle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(cycle_folder, tmp_path)
    pipeline.prepare(config)
    step = Trainer.step

    def poisons_the_sixth(self: Trainer, rows: Any) -> Any:
        if self.position.step == 5:
            with torch.no_grad():
                self.learner.backbone.mask.fill_(torch.nan)
        return step(self, rows)

    monkeypatch.setattr(Trainer, "step", poisons_the_sixth)
    with pytest.raises(TrainingError, match=r"not finite at step 5 .*items \[.*step-00000004"):
        pipeline.pretrain(config)


def test_patience_ends_training_and_the_best_checkpoint_is_kept(
    cycle_folder: Path, tmp_path: Path
) -> None:
    config = _config(cycle_folder, tmp_path, epochs=50)
    settings = config.pretrain
    assert settings is not None
    # A learning rate that moves nothing: no validation improves on the first.
    still = settings.model_copy(update={"learning_rate": 1e-30, "patience": 2})
    config = config.model_copy(update={"pretrain": still})
    pipeline.prepare(config)
    result = pipeline.pretrain(config)
    assert [entry["epoch"] for entry in result.values["curve"]] == [0, 1, 2]
    assert result.checkpoint.name == "step-00000000"
    assert result.checkpoint.is_dir()


def test_the_curve_is_in_the_result_file(cycle_folder: Path, tmp_path: Path) -> None:
    config = _config(cycle_folder, tmp_path, epochs=1)
    pipeline.prepare(config)
    pipeline.pretrain(config)
    written = json.loads((tmp_path / "pretrain/result.json").read_text())
    assert written["curve"][-1]["losses"]["masked_item"] > 0
    assert written["curve"][-1]["metrics"]["ndcg@10"] > 0
    assert list((tmp_path / "pretrain/tensorboard").iterdir())
