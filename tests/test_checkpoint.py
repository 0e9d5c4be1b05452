"""Checkpoints come back bit for bit, hold no pickle, and are whole or refused."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_config
from torchrec_pt import checkpoint
from torchrec_pt.build import Built, build_learner, build_objectives
from torchrec_pt.checkpoint import CheckpointError
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.optim import Optimizers

STATE = {"position": {"epoch": 3, "best": 0.1}, "text": "ü"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(5, 3, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "integers": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
    }


@pytest.fixture
def saved(tmp_path: Path, ranks: Ranks) -> Path:
    return checkpoint.save(tmp_path, 12, _tensors(), STATE, ranks)


def _bits(tensor: Any) -> bytes:
    if hasattr(tensor, "local_shards"):
        (shard,) = tensor.local_shards()
        tensor = shard.tensor
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# --- there and back -----------------------------------------------------------------------------


def test_tensors_and_state_come_back_as_they_were(saved: Path) -> None:
    assert saved.name == "step-00000012"
    loaded = {name: torch.full_like(tensor, 9) for name, tensor in _tensors().items()}
    checkpoint.load(saved, loaded)
    for name, tensor in _tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert checkpoint.load_state(saved) == STATE
    assert checkpoint.shapes(saved)["matrix"] == (5, 3)


class _Training:
    """A few steps of pretraining, whose state a checkpoint must hold whole."""

    def __init__(
        self, folder: Path, seed: int, table: dict[str, Any], data: PreparedDataset, ranks: Ranks
    ) -> None:
        model = {"dim": 16, "num_layers": 1, "max_length": 8, "item_table": table}
        config: RunConfig = tiny_config(folder, model=model, seed=seed)
        assert config.pretrain is not None
        objectives = build_objectives(config, data)
        self.built: Built = build_learner(config, config.pretrain, objectives, data, ranks)
        self.optimizers = Optimizers(self.built.model, config.pretrain, self.built.placement, 100)
        self.loader = HistoryLoader(data, batch_size=10, max_length=8, seed=0, ranks=ranks)

    def epoch(self, epoch: int) -> list[float]:
        losses = []
        for step, rows in enumerate(self.loader.steps(epoch)):
            self.optimizers.prepare(4 * epoch + step)
            out = self.built.model(self.built.learner.draw(rows))
            out.loss.backward()
            self.optimizers.step()
            losses.append(float(out.means.sum()))
        return losses

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.built.model.state_dict() | self.optimizers.state()


@pytest.mark.parametrize(
    "table",
    [{"placement": "replicated"}, {"placement": "row_wise", "optimizer": "rowwise_adagrad"}],
    ids=["adamw", "rowwise_adagrad"],
)
def test_model_and_optimizers_come_back_bit_for_bit_and_train_on_alike(
    tmp_path: Path, cycle: PreparedDataset, ranks: Ranks, table: dict[str, Any]
) -> None:
    first = _Training(tmp_path, 0, table, cycle, ranks)
    first.epoch(0)
    path = checkpoint.save(tmp_path, 4, first.tensors, {}, ranks)
    second = _Training(tmp_path, 1, table, cycle, ranks)  # other initial values
    checkpoint.load(path, second.tensors)

    expected, got = first.tensors, second.tensors
    assert expected.keys() == got.keys()
    kinds = {name.rsplit(".", 1)[1] for name in expected}
    assert {"exp_avg", "exp_avg_sq", "step"} <= kinds
    assert ("sum" in kinds) == (table["placement"] == "row_wise")
    for name, tensor in expected.items():
        assert _bits(tensor) == _bits(got[name]), name
    assert second.epoch(1) == first.epoch(1)


# --- what is refused ----------------------------------------------------------------------------


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_state(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _files(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.name != "complete.json")


@pytest.mark.parametrize("damage", ["a flipped byte", "cut short", "removed"])
def test_damage_to_any_file_is_refused_by_one_line_that_names_it(saved: Path, damage: str) -> None:
    for name in _files(saved):
        file = saved / name
        whole = file.read_bytes()
        if damage == "a flipped byte":
            middle = len(whole) // 2
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        elif damage == "cut short":
            file.write_bytes(whole[:-1])
        else:
            file.unlink()
        assert _refusal(saved) == f"{file}: damaged or missing; use another checkpoint"
        file.write_bytes(whole)
        assert checkpoint.load_state(saved) == STATE


@pytest.mark.parametrize("content", [None, "", '{"state.json": '])
def test_without_the_mark_of_completeness_it_is_refused(saved: Path, content: str | None) -> None:
    mark = saved / "complete.json"
    mark.unlink()
    if content is not None:
        mark.write_text(content)
    assert _refusal(saved) == f"{saved}: no complete checkpoint; use another one"


def test_damaged_tensors_are_not_loaded(saved: Path) -> None:
    (shard,) = saved.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError):
        checkpoint.load(saved, _tensors())


def test_tensors_of_another_model_are_refused_by_one_line(saved: Path) -> None:
    with pytest.raises(CheckpointError, match='holds no tensor "other"; it is of another'):
        checkpoint.load(saved, {"other": torch.zeros(1)})
    message = '"matrix" is (5, 3), the model wants (5, 4); use the configuration'
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.load(saved, {"matrix": torch.zeros(5, 4)})


# --- on disk ------------------------------------------------------------------------------------


def test_nothing_on_disk_is_pickled(saved: Path) -> None:
    files = sorted(saved.iterdir())
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    for file in files:
        head = file.read_bytes()[:2]
        assert head[:1] != b"\x80", f"{file.name}: pickle"
        assert head != b"PK", f"{file.name}: zip, as torch.save writes"
        if file.suffix == ".json":
            json.loads(file.read_text())


@pytest.mark.parametrize(
    "step", ["dcp.save", "HuggingFaceStorageWriter.write_data", "sha256", "fsync"]
)
def test_an_interrupted_save_leaves_no_checkpoint_and_the_next_one_is_whole(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    older = checkpoint.save(tmp_path, 1, _tensors(), STATE, ranks)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(f"torchrec_pt.checkpoint.{step}", full_disk)
    message = f"{tmp_path}/step-00000002: cannot be written, No space left on device; free space"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path, 2, _tensors(), STATE, ranks)
    assert list(tmp_path.iterdir()) == [older]
    monkeypatch.undo()
    newer = checkpoint.save(tmp_path, 2, _tensors(), STATE, ranks)
    assert checkpoint.saved(tmp_path) == [older, newer]
    assert sorted(path.name for path in tmp_path.iterdir()) == [older.name, newer.name]
    assert checkpoint.load_state(newer) == STATE


def test_saving_a_step_again_replaces_it(saved: Path, ranks: Ranks) -> None:
    other = {"matrix": torch.ones(2)}
    assert checkpoint.save(saved.parent, 12, other, {}, ranks) == saved
    assert checkpoint.shapes(saved) == {"matrix": (2,)}
    assert checkpoint.load_state(saved) == {}


@pytest.mark.parametrize(
    ("keep_last", "best", "left"), [(2, 3, [3, 4, 5]), (2, 4, [4, 5]), (1, 0, [0, 5]), (9, 0, None)]
)
def test_prune_keeps_the_last_ones_and_the_best(
    tmp_path: Path, keep_last: int, best: int, left: list[int] | None
) -> None:
    for step in range(6):
        (tmp_path / f"step-{step:08d}").mkdir()
    checkpoint.prune(tmp_path, keep_last, tmp_path / f"step-{best:08d}")
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.saved(tmp_path)]
    assert steps == (list(range(6)) if left is None else left)
