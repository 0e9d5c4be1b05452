"""Checkpoints come back bit for bit, hold no pickle, and are whole or refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from tests.conftest import tiny_config
from torchrec_pt.build import Built, build_learner
from torchrec_pt.checkpoint import Checkpoint, CheckpointError, parts_of
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.optim import Optimizers
from torchrec_pt.saver import Saver
from torchrec_pt.transfer import model_tensors, optimizer_tensors

STATE = {"position": {"epoch": 3, "best": 0.1}, "text": "ü"}
IDS = pl.Series("external_id", ["a", "ü", "c"])


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


def _save(folder: Path, step: int, tensors: dict[str, Tensor], ranks: Ranks) -> Path:
    with Saver(folder, IDS, ranks, keep_last=9, in_background=False) as saver:
        saver.save(step, tensors, STATE, best_step=step)
    return folder / f"step-{step:08d}"


@pytest.fixture
def saved(tmp_path: Path, ranks: Ranks) -> Path:
    return _save(tmp_path, 12, _tensors(), ranks)


def _bits(tensor: Any) -> bytes:
    parts = [part for _, part in parts_of(tensor)]
    return b"".join(p.contiguous().flatten().view(torch.uint8).numpy().tobytes() for p in parts)


# --- there and back -----------------------------------------------------------------------------


def test_tensors_state_and_ids_come_back_as_they_were(saved: Path, ranks: Ranks) -> None:
    opened = Checkpoint.open(saved, ranks)
    loaded = {name: torch.full_like(tensor, 9) for name, tensor in _tensors().items()}
    opened.load(loaded, IDS)
    for name, tensor in _tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert opened.state == STATE
    assert opened.items.to_list() == IDS.to_list()
    assert {name: saved.shape for name, saved in opened.tensors.items()} == {
        name: tuple(t.shape) for name, t in _tensors().items()
    }
    assert opened.made_by.startswith("torchrec_pt ")


def test_a_box_of_a_tensor_is_read_alone(saved: Path, ranks: Ranks) -> None:
    opened, matrix = Checkpoint.open(saved, ranks), _tensors()["matrix"]
    assert torch.equal(opened.read("matrix"), matrix)
    assert torch.equal(opened.read("matrix", (1, 4), (2, 3)), matrix[1:4, 2:3])
    assert torch.equal(opened.read("scalar"), torch.tensor([2.5]))


class _Training:
    """A few steps of pretraining, whose state a checkpoint must hold whole."""

    def __init__(
        self, folder: Path, seed: int, table: dict[str, Any], data: PreparedDataset, ranks: Ranks
    ) -> None:
        dim = 256 if table["placement"] == "column_wise" else 16  # two shards of 128 columns
        model = {"dim": dim, "num_layers": 1, "max_length": 8, "item_table": table}
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
        return model_tensors(self.built.model) | optimizer_tensors(self.optimizers)


@pytest.mark.parametrize(
    "table",
    [
        {"placement": "replicated"},
        {"placement": "row_wise", "optimizer": "rowwise_adagrad"},
        {"placement": "column_wise", "optimizer": "adagrad"},
    ],
    ids=["adamw", "rowwise_adagrad", "column_wise"],
)
def test_model_and_optimizers_come_back_bit_for_bit_and_train_on_alike(
    tmp_path: Path, cycle: PreparedDataset, ranks: Ranks, table: dict[str, Any]
) -> None:
    first = _Training(tmp_path, 0, table, cycle, ranks)
    first.epoch(0)
    path = _save(tmp_path, 4, first.tensors, ranks)
    second = _Training(tmp_path, 1, table, cycle, ranks)  # other initial values
    Checkpoint.open(path, ranks).load(second.tensors, IDS)

    expected, got = first.tensors, second.tensors
    assert expected.keys() == got.keys()
    kinds = {name.rsplit(".", 1)[1] for name in expected}
    assert {"exp_avg", "exp_avg_sq", "step"} <= kinds
    assert any(name.endswith(".item.weight.sum") for name in expected) == (
        table["placement"] != "replicated"
    )
    for name, tensor in expected.items():
        assert _bits(tensor) == _bits(got[name]), name
    assert second.epoch(1) == first.epoch(1)


# --- what is refused ----------------------------------------------------------------------------


def _refusal(path: Path, ranks: Ranks) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, ranks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _files(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.name != "complete.json")


@pytest.mark.parametrize("damage", ["a flipped byte", "cut short", "emptied", "removed"])
def test_damage_to_any_file_is_refused_by_one_line_that_names_it(
    saved: Path, ranks: Ranks, damage: str
) -> None:
    assert len(_files(saved)) == 3
    for name in _files(saved):
        file = saved / name
        whole = file.read_bytes()
        if damage == "a flipped byte":
            middle = len(whole) // 2
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        elif damage == "removed":
            file.unlink()
        else:
            file.write_bytes(whole[:-1] if damage == "cut short" else b"")
        assert _refusal(saved, ranks) == f"{file}: damaged or missing; use another checkpoint"
        file.write_bytes(whole)
        assert Checkpoint.open(saved, ranks).state == STATE


@pytest.mark.parametrize("content", [None, "", '{"state.json": ', "[]", "{}"])
def test_without_the_mark_of_completeness_it_is_refused(
    saved: Path, ranks: Ranks, content: str | None
) -> None:
    mark = saved / "complete.json"
    mark.unlink()
    if content is not None:
        mark.write_text(content)
    assert _refusal(saved, ranks) == f"{saved}: no complete checkpoint; use another one"


def _rewrite(path: Path, name: str, content: bytes) -> None:
    """As somebody would who knows the format: the hash is right."""
    (path / name).write_bytes(content)
    hashes = json.loads((path / "complete.json").read_text())
    hashes[name] = hashlib.sha256(content).hexdigest()
    (path / "complete.json").write_text(json.dumps(hashes))


def test_a_file_outside_the_folder_is_not_read(saved: Path, ranks: Ranks) -> None:
    for name in ("../elsewhere", "/etc/hostname", "..", "a/b"):
        hashes = json.loads((saved / "complete.json").read_text())
        (saved / "complete.json").write_text(json.dumps({**hashes, name: "0" * 64}))
        assert f'names "{name}", which is no file of the checkpoint' in _refusal(saved, ranks)
        (saved / "complete.json").write_text(json.dumps(hashes))


def test_a_file_too_many_is_refused(saved: Path, ranks: Ranks) -> None:
    extra = saved / "shard-00009-00000.safetensors"
    extra.write_bytes(next(saved.glob("*.safetensors")).read_bytes())
    assert _refusal(saved, ranks).startswith(f"{extra}: is no file of the checkpoint")


@pytest.mark.parametrize(
    ("change", "found"), [({"version": 3}, "3"), ({"version": None}, "1"), ({"format": "x"}, "2")]
)
def test_another_format_or_version_is_refused(
    saved: Path, ranks: Ranks, change: dict[str, Any], found: str
) -> None:
    document = json.loads((saved / "state.json").read_text())
    _rewrite(saved, "state.json", json.dumps({**document, **change}).encode())
    said = _refusal(saved, ranks)
    assert said.startswith(f"{saved}: is of format version {found}, this is torchrec_pt with ")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04N.", b"\xff" * 64, (2).to_bytes(8, "little") + b"{}" + b"tail"],
    ids=["nothing", "a pickle", "noise", "bytes of no tensor"],
)
def test_shards_that_are_no_safetensors_are_refused(
    saved: Path, ranks: Ranks, content: bytes
) -> None:
    (shard,) = saved.glob("*.safetensors")
    _rewrite(saved, shard.name, content)
    assert "its shards are no safetensors of this format" in _refusal(saved, ranks)


def test_a_tensor_in_part_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    saved = _save(tmp_path, 1, {"matrix": torch.ones(4, 2)}, ranks)
    (shard,) = saved.glob("*.safetensors")
    content = shard.read_bytes().replace(b"[0, 0]", b"[4, 0]").replace(b"[0,0]", b"[4,0]")
    _rewrite(saved, shard.name, content)
    assert _refusal(saved, ranks).startswith(f'{saved}: holds "matrix" in part only')


def test_what_does_not_fit_is_refused_by_one_line_before_anything_changed(
    saved: Path, ranks: Ranks
) -> None:
    opened = Checkpoint.open(saved, ranks)
    matrix = torch.full((5, 3), 9.0)
    for name, tensor, said in [
        ("other", torch.zeros(1), 'holds no tensor "other"; it is of another model'),
        ("integers", torch.zeros(8).long(), '"integers" is (7,), the model wants (8,); use the'),
        ("scalar", torch.zeros(1), '"scalar" is (), the model wants (1,); use the'),
        ("half", torch.zeros(4), '"half" is torch.bfloat16, the model wants torch.float32; use'),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(said)):
            opened.load({"matrix": matrix, name: tensor}, IDS)
    for ids in (["a", "c", "ü"], ["a", "ü"]):
        with pytest.raises(CheckpointError, match="is of another catalogue of 3 items; use the"):
            opened.load({"matrix": matrix}, pl.Series(ids))
    assert (matrix == 9).all()


# --- on disk ------------------------------------------------------------------------------------


def test_nothing_on_disk_is_pickled(saved: Path) -> None:
    files = sorted(saved.iterdir())
    assert {file.suffix for file in files} == {".json", ".parquet", ".safetensors"}
    for file in files:
        head = file.read_bytes()[:2]
        assert head[:1] != b"\x80", f"{file.name}: pickle"
        assert head != b"PK", f"{file.name}: zip, as torch.save writes"
        if file.suffix == ".json":
            json.loads(file.read_text())


def test_nothing_is_pickled_or_unpickled_on_the_way(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what ranks tell each other, whose pickles torch.distributed has from the start."""

    def refuses(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, refuses)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuses)
    assert filesystem.pickle is pickle  # torch.distributed.checkpoint's own metadata
    path = _save(tmp_path, 1, _tensors(), ranks)
    loaded = {name: torch.full_like(tensor, 9) for name, tensor in _tensors().items()}
    Checkpoint.open(path, ranks).load(loaded, IDS)
    assert torch.equal(loaded["matrix"], _tensors()["matrix"])
