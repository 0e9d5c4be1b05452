"""The average of the weights is what is judged and kept; training knows nothing of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import tiny_config
from torchrec_pt import pipeline
from torchrec_pt.averaging import AveragedWeights
from torchrec_pt.build import build_task, load_learner
from torchrec_pt.checkpoint import saved
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.train import Trainer
from torchrec_pt.validation import validation

DECAY = 0.6


def _config(cycle_folder: Path, run_dir: Path, **train: Any) -> RunConfig:
    settings = {"epochs": 3, "batch_size": 10, "warmup_steps": 0, "learning_rate": 0.01}
    model = {"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0.2}
    config = tiny_config(
        cycle_folder,
        model={**model, **train.pop("model", {})},
        pretrain={**settings, "objectives": [{"name": "masked_item"}], **train},
        finetune={"rating": {**settings, "epochs": 1, **train}},
    )
    config = config.model_copy(update={"run_dir": run_dir})
    pipeline.prepare(config)
    return config


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    (file,) = checkpoint.glob("*.safetensors")
    return load_file(file)


def _hashes(folder: Path) -> dict[str, str]:
    """Of every tensor in every checkpoint below `folder`."""
    return {
        f"{path.relative_to(folder)}: {name}": hashlib.sha256(tensor.numpy()).hexdigest()
        for path in sorted(folder.rglob("step-*"))
        for name, tensor in _tensors(path).items()
    }


def _of(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {n.removeprefix(kind): value for n, value in tensors.items() if n.startswith(kind)}


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_the_average_is_its_closed_form(decay: float) -> None:
    """Σ_t (1 − d_t) Π_{s > t} d_s w_t, and Π d_t of the initial weights."""
    draw = torch.Generator().manual_seed(0)
    walk = torch.randn(41, 5, generator=draw, dtype=torch.float64).cumsum(0)
    weight = walk[0].float()
    averaged = AveragedWeights({"w": weight}, decay)
    for step, value in enumerate(walk[1:]):
        weight.copy_(value)
        averaged.update(step)
    steps = torch.arange(40, dtype=torch.float64)
    decays = ((1 + steps) / (10 + steps)).clamp(max=decay)
    left = torch.cat([decays.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    shares = torch.cat([left[:1], (1 - decays) * left[1:]])
    assert shares.sum() == pytest.approx(1)
    got = averaged.tensors()
    # 40 roundings of float32 to numbers of size 10
    torch.testing.assert_close(got["model.w"].double(), shares @ walk, rtol=1e-5, atol=1e-5)
    assert got["raw.w"].data_ptr() == weight.data_ptr()


def test_the_averages_are_in_place_inside_and_the_weights_are_back_after() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.1, -0.0, 3e-40, torch.inf]))
    averaged = AveragedWeights({"w": weight}, DECAY)
    expected = averaged.tensors()["model.w"].clone()
    with torch.no_grad():
        weight.add_(1)
    before = weight.detach().clone()

    def breaks_off() -> None:
        with averaged.in_place():
            assert weight.view(torch.int32).equal(expected.view(torch.int32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaks_off()
    assert weight.equal(before)
    assert averaged.tensors()["model.w"].view(torch.int32).equal(expected.view(torch.int32))


def test_training_goes_on_with_the_weights_as_if_there_were_no_average(
    cycle_folder: Path, tmp_path: Path
) -> None:
    pipeline.pretrain(_config(cycle_folder, tmp_path / "plain"))
    pipeline.pretrain(_config(cycle_folder, tmp_path / "averaged", average_decay=DECAY))
    plain, averaged = (
        _tensors(saved(tmp_path / name / "pretrain/checkpoints")[-1])
        for name in ("plain", "averaged")
    )
    assert not _of(plain, "raw.")
    raw, model, expected = _of(averaged, "raw."), _of(averaged, "model."), _of(plain, "model.")
    assert raw.keys() == expected.keys() == model.keys()
    for name, value in raw.items():
        assert value.equal(expected[name]), name
        assert not model[name].equal(value), name
    for name, value in _of(plain, "optimizer.").items():
        assert averaged[f"optimizer.{name}"].equal(value), name


@pytest.mark.parametrize("optimizer", ["adamw", "adagrad"])
@pytest.mark.parametrize("dies_at", [3, 8], ids=["first epoch", "second epoch"])
def test_a_killed_stage_ends_as_the_uninterrupted_one(
    cycle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    dies_at: int,
) -> None:
    settings: dict[str, Any] = {"average_decay": DECAY, "checkpoint_every": 3}
    settings["model"] = {"item_table": {"placement": "replicated", "optimizer": optimizer}}
    whole, broken = (_config(cycle_folder, tmp_path / name, **settings) for name in ("a", "b"))
    expected = pipeline.pretrain(whole)
    step = Trainer.step

    def dies(self: Trainer, rows: Any) -> Any:
        if self.position.step == dies_at:
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.pretrain(broken)
    monkeypatch.undo()
    resumed = pipeline.pretrain(broken)
    assert resumed.values["curve"] == expected.values["curve"]
    assert _hashes(tmp_path / "b/pretrain") == _hashes(tmp_path / "a/pretrain")


@pytest.mark.parametrize("task", [None, "rating"])
def test_validation_and_whoever_loads_a_checkpoint_see_the_average(
    cycle_folder: Path, tmp_path: Path, task: str | None
) -> None:
    config = _config(cycle_folder, tmp_path, average_decay=DECAY)
    result = pipeline.pretrain(config)
    if task is not None:
        result = pipeline.finetune(config)[task]["pretrained"]
    dataset = PreparedDataset.load(config.prepared_dir)
    checkpoint = saved(result.folder / "checkpoints")[-1]
    validated = result.values["curve"][-1]
    assert f"{validated['step']:08d}" in checkpoint.name
    with joined_ranks() as ranks:
        tasks = [] if task is None else [build_task(config, task, dataset)]
        learner = load_learner(config, checkpoint, dataset, ranks, tasks)
        assert validation(config, dataset, learner, ranks)() == validated["metrics"]
        with torch.no_grad():
            for name, weight in learner.named_parameters():
                weight.copy_(_tensors(checkpoint)[f"raw.{name}"])
        assert validation(config, dataset, learner, ranks)() != validated["metrics"]


def test_who_starts_from_a_checkpoint_starts_from_the_average(
    cycle_folder: Path, tmp_path: Path
) -> None:
    source = _config(cycle_folder, tmp_path / "a", average_decay=DECAY)
    done = pipeline.pretrain(source)
    config = _config(cycle_folder, tmp_path / "b", average_decay=DECAY, keep_checkpoints=9)
    assert config.pretrain is not None
    goes_on = config.pretrain.model_copy(update={"continue_from": tmp_path / "a/pretrain"})
    result = pipeline.pretrain(config.model_copy(update={"pretrain": goes_on}))
    assert not [name for name in result.values["transfer"]["dropped"] if name.startswith("raw.")]
    assert result.values["curve"][0]["metrics"] == done.metrics
    start = _tensors(saved(result.folder / "checkpoints")[0])
    for name, value in _of(_tensors(done.checkpoint), "model.").items():
        assert start[f"raw.{name}"].equal(value), name
        assert start[f"model.{name}"].equal(value), name


def test_a_sharded_table_is_refused(cycle_folder: Path, tmp_path: Path) -> None:
    table = {"item_table": {"placement": "row_wise", "optimizer": "adagrad"}}
    config = _config(cycle_folder, tmp_path, average_decay=DECAY, model=table)
    with pytest.raises(ValueError, match=r"^average_decay: a sharded table .*; drop average_decay"):
        pipeline.pretrain(config)
