"""Training stops, resumes and repeats as it should."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import tiny_config
from torchrec_pt import pipeline, saver
from torchrec_pt.checkpoint import CheckpointError, saved
from torchrec_pt.config import RunConfig
from torchrec_pt.runs import find_checkpoint, finished_stages
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


def _with(config: RunConfig, **settings: Any) -> RunConfig:
    assert config.pretrain is not None
    pretrain = config.pretrain.model_copy(update=settings)
    return config.model_copy(update={"pretrain": pretrain})


class _KilledError(Exception):
    pass


def _die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise in the place of the `step`-th step of this process."""
    real, steps = Trainer.step, 0

    def dies(self: Trainer, rows: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            raise _KilledError
        return real(self, rows)

    monkeypatch.setattr(Trainer, "step", dies)


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

    _die_at(monkeypatch, dies_at)  # of 4 an epoch
    with pytest.raises(_KilledError):
        pipeline.pretrain(broken)
    monkeypatch.undo()
    resumed = pipeline.pretrain(broken)

    # Bit for bit: the same machine, the same process, the same order of sums.
    assert resumed.values["curve"] == expected.values["curve"]
    assert resumed.metrics == expected.metrics


@pytest.mark.parametrize(
    ("every", "dies_at", "newest_step", "in_background"),
    [(1, 7, 6, False), (3, 8, 6, True), (2, 10, 8, True), (5, 16, 15, True)],
)
def test_a_stage_killed_within_an_epoch_ends_as_the_uninterrupted_one(
    cycle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    dies_at: int,
    newest_step: int,
    in_background: bool,
) -> None:
    whole = _config(cycle_folder, tmp_path / "a")
    pipeline.prepare(whole)
    expected = pipeline.pretrain(whole)
    broken = _with(
        whole.model_copy(update={"run_dir": tmp_path / "b"}),
        checkpoint_every=every,
        async_checkpoints=in_background,
    )
    shutil.copytree(whole.prepared_dir, broken.prepared_dir)
    _die_at(monkeypatch, dies_at)
    with pytest.raises(_KilledError):
        pipeline.pretrain(broken)
    monkeypatch.undo()
    newest = saved(tmp_path / "b/pretrain/checkpoints")[-1]
    position = json.loads((newest / "state.json").read_text())["state"]["position"]
    assert position["step"] == newest_step
    assert position["epoch_step"] == newest_step % 4
    resumed = pipeline.pretrain(broken)
    assert resumed.values["curve"] == expected.values["curve"]
    assert resumed.fingerprint == expected.fingerprint  # how it is saved is no part of the result


def test_checkpoints_between_validations_are_saved_and_the_best_is_one_with_a_validation(
    cycle_folder: Path, tmp_path: Path
) -> None:
    config = _config(cycle_folder, tmp_path)
    # Nothing moves: the first validation stays the best.
    config = _with(config, checkpoint_every=4, validate_every=4, learning_rate=1e-30)
    pipeline.prepare(config)
    result = pipeline.pretrain(config)
    names = [path.name for path in saved(tmp_path / "pretrain/checkpoints")]
    assert names == ["step-00000000", "step-00000012", "step-00000016"]
    assert result.checkpoint.name == "step-00000000"
    assert [entry["step"] for entry in result.values["curve"]] == [0, 16]


@pytest.mark.parametrize("damage", ["cut", "foreign", "half"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(
    cycle_folder: Path, tmp_path: Path, damage: str
) -> None:
    config = _config(cycle_folder, tmp_path)
    pipeline.prepare(config)
    expected = pipeline.pretrain(config)
    (tmp_path / "pretrain/result.json").unlink()
    *_, before, newest = saved(tmp_path / "pretrain/checkpoints")
    shard = next(newest.glob("*.safetensors"))
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-4])
    elif damage == "foreign":
        (newest / "model.bin").write_bytes(b"PK")
    else:
        (newest / "complete.json").unlink()
    screen = io.StringIO()
    resumed = pipeline.pretrain(config, Console(file=screen, soft_wrap=True))
    said = screen.getvalue()
    assert re.search(rf"pretrain: skipped, {newest}.*; moved to {tmp_path}/pretrain/", said), said
    assert f"resumed at epoch 3 from {before}" in said
    assert resumed.values["curve"] == expected.values["curve"]
    assert (tmp_path / "pretrain/checkpoints.damaged" / newest.name).is_dir()


def test_where_every_checkpoint_is_damaged_training_starts_anew_and_none_is_deleted(
    cycle_folder: Path, tmp_path: Path
) -> None:
    config = _config(cycle_folder, tmp_path, epochs=1)
    pipeline.prepare(config)
    expected = pipeline.pretrain(config)
    (tmp_path / "pretrain/result.json").unlink()
    for round_ in (1, 2):
        for path in saved(tmp_path / "pretrain/checkpoints"):
            (path / "state.json").write_text("{")
        assert pipeline.pretrain(config).values["curve"] == expected.values["curve"]
        (tmp_path / "pretrain/result.json").unlink()
        kept = list((tmp_path / "pretrain/checkpoints.damaged").iterdir())
        assert len(kept) == 2 * round_


def test_checkpoints_of_another_configuration_are_moved_aside_and_back(
    cycle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _config(cycle_folder, tmp_path, epochs=3)
    other = _with(first, learning_rate=0.01)
    pipeline.prepare(first)
    _die_at(monkeypatch, 10)  # in the third epoch
    with pytest.raises(_KilledError):
        pipeline.pretrain(first)
    monkeypatch.undo()
    names = [path.name for path in saved(tmp_path / "pretrain/checkpoints")]
    screen = io.StringIO()
    console = Console(file=screen, soft_wrap=True)
    pipeline.pretrain(other, console)
    (old,) = (tmp_path / "pretrain").glob("checkpoints.old-*")
    assert f"was of another configuration or data; moved to {old}" in screen.getvalue()
    assert [path.name for path in saved(old)] == names
    pipeline.pretrain(first, console)
    assert "resumed at epoch 2" in screen.getvalue()
    assert not old.exists()
    assert len(list((tmp_path / "pretrain").glob("checkpoints.old-*"))) == 1


@pytest.mark.parametrize("in_background", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_training_by_one_line(
    cycle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    config = _with(_config(cycle_folder, tmp_path), async_checkpoints=in_background)
    pipeline.prepare(config)
    write, writes = saver.write_safetensors, 0

    def full_later(*given: Any) -> str:
        nonlocal writes
        writes += 1
        if writes == 3:
            raise OSError(errno.ENOSPC, "no space left")
        return write(*given)

    monkeypatch.setattr(saver, "write_safetensors", full_later)
    with pytest.raises(CheckpointError, match="step-00000008: cannot be written, No space"):
        pipeline.pretrain(config)
    assert [path.name[-1] for path in saved(tmp_path / "pretrain/checkpoints")] == ["0", "4"]


# --- going on from another run --------------------------------------------------------------------


def test_pretraining_continues_another_run_with_its_optimizer_and_a_schedule_of_its_own(
    cycle_folder: Path, tmp_path: Path
) -> None:
    source = _config(cycle_folder, tmp_path / "a", epochs=2)
    pipeline.prepare(source)
    done = pipeline.pretrain(source)
    config = _with(
        source.model_copy(update={"run_dir": tmp_path / "b"}),
        continue_from=tmp_path / "a/pretrain",
        epochs=1,
    )
    shutil.copytree(source.prepared_dir, config.prepared_dir)
    screen = io.StringIO()
    result = pipeline.pretrain(config, Console(file=screen, soft_wrap=True))
    loaded = rf"pretrain: continues from {done.checkpoint}: loaded \d+ \(backbone \d+.*optimizer "
    assert re.search(loaded, screen.getvalue()), screen.getvalue()
    # It begins where the other one was at its best.
    assert result.values["curve"][0]["metrics"] == done.metrics
    assert [entry["step"] for entry in result.values["curve"]] == [0, 4]
    assert not result.values["transfer"]["new"]
    assert any("exp_avg" in name for name in result.values["transfer"]["loaded"])
    assert result.fingerprint != pipeline.pretrain(_with(config, continue_from=None)).fingerprint


def test_what_pretraining_continued_from_may_change_or_go(
    cycle_folder: Path, tmp_path: Path
) -> None:
    source = _config(cycle_folder, tmp_path / "a", epochs=1)
    dataset = pipeline.prepare(source)
    pipeline.pretrain(source)
    config = _with(
        source.model_copy(update={"run_dir": tmp_path / "b"}),
        continue_from=tmp_path / "a/pretrain",
    )
    shutil.copytree(source.prepared_dir, config.prepared_dir)
    first = pipeline.pretrain(config)
    pipeline.pretrain(_with(source, learning_rate=0.1))
    assert "pretrain" not in finished_stages(config, dataset)  # it would be another one now
    shutil.rmtree(tmp_path / "a")
    assert pipeline.pretrain(config).values == first.values
    config = config.model_copy(update={"run_dir": tmp_path / "c"})
    shutil.copytree(tmp_path / "b/prepared", config.prepared_dir)
    with pytest.raises(ValueError, match=r"continue_from: .*/a/pretrain holds no checkpoint; give"):
        pipeline.pretrain(config)


def test_the_checkpoint_to_continue_from_is_the_best_or_the_newest_or_itself(
    cycle_folder: Path, tmp_path: Path
) -> None:
    config = _with(_config(cycle_folder, tmp_path, epochs=3), learning_rate=1e-30)
    pipeline.prepare(config)
    pipeline.pretrain(config)
    folder = tmp_path / "pretrain"
    checkpoints = saved(folder / "checkpoints")
    assert find_checkpoint(folder) == checkpoints[0]
    assert find_checkpoint(checkpoints[1]) == checkpoints[1]
    assert find_checkpoint(folder / "checkpoints") == checkpoints[-1]
    (folder / "result.json").unlink()
    assert find_checkpoint(folder) == checkpoints[-1]


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
