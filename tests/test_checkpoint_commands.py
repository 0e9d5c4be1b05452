"""torchrec-pt checkpoint inspect, verify, convert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchrec.distributed.planner.types import ParameterConstraints

from tests.conftest import tiny_config
from torchrec_pt import checkpoint, cli, pipeline, sharding
from torchrec_pt.checkpoint import Checkpoint, saved
from torchrec_pt.config import RunConfig
from torchrec_pt.distributed import joined_ranks

TABLE = "backbone.items.collection.embeddings.item.weight"
# The objective's temperature is a scalar; and the one rank holds two shards of the table.
OBJECTIVES = [{"name": "contrastive", "pairs": "user_item", "learn_temperature": True}]
ITEM_TABLE = {"placement": "column_wise", "optimizer": "adagrad"}


@pytest.fixture(scope="module")
def run(cycle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    model = {"dim": 256, "num_layers": 1, "max_length": 8, "item_table": ITEM_TABLE}
    pretrain = {"epochs": 1, "batch_size": 10, "objectives": OBJECTIVES}
    config = tiny_config(cycle_folder, model=model, pretrain=pretrain)
    config = config.model_copy(update={"run_dir": folder})
    pipeline.prepare(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "ParameterConstraints", _in_halves)
        pipeline.pretrain(config)
    return config


def _in_halves(**given: Any) -> ParameterConstraints:
    return ParameterConstraints(**{**given, "min_partition": 128})


@pytest.fixture(scope="module")
def newest(run: RunConfig) -> Path:
    return saved(run.run_dir / "pretrain/checkpoints")[-1]


def _call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["torchrec-pt", "checkpoint", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_inspect_shows_tensors_position_metrics_and_origin(
    newest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(monkeypatch, "inspect", newest) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if f" model.{TABLE} " in line]
    assert line.split()[1:] == ["30", "×", "256", "float32", "0.031", "2"]
    assert "scalar" in shown
    assert "step 4, epoch 1; 30 items" in shown
    assert "validated at step 4: " in shown
    assert "ndcg@10 0." in shown
    assert "made by torchrec_pt 0.1.0, torch 2." in shown


def test_inspect_as_json(
    newest: Path,
    run: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _call(monkeypatch, "inspect", newest, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    result = json.loads((run.run_dir / "pretrain/result.json").read_text())
    assert about["metrics"] == result["curve"][-1]["metrics"]
    assert about["fingerprint"] == result["fingerprint"]
    assert about["tensors"][f"model.{TABLE}"] == {
        "shape": [30, 256],
        "dtype": "float32",
        "bytes": 30 * 256 * 4,
        "shards": 2,
    }


def test_verify_says_which_of_a_folder_are_bad_by_exit_code_2(
    run: RunConfig,
    newest: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = run.run_dir / "pretrain"
    for path in (stage, stage / "checkpoints", newest):
        assert _call(monkeypatch, "verify", path) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (1 if path == newest else 2)
        assert all(line.startswith("whole: ") for line in lines)
    state = newest / "state.json"
    whole = state.read_text()
    state.write_text(whole + " ")
    assert _call(monkeypatch, "verify", stage) == 2
    good, bad = capsys.readouterr().out.splitlines()
    assert good.startswith("whole: ")
    assert bad == f"bad: {state}: damaged or missing; use another checkpoint"
    state.write_text(whole)


def test_a_path_without_a_checkpoint_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["inspect", tmp_path], ["convert", tmp_path, tmp_path / "x.safetensors"]):
        assert _call(monkeypatch, *words) == 2
        said = capsys.readouterr().err
        assert said == f"torchrec-pt: {tmp_path}: no complete checkpoint; use another one\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block_bytes", [9999, checkpoint.BLOCK_BYTES])
def test_convert_writes_one_file_that_safetensors_reads(
    newest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    block_bytes: int,
) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    out = tmp_path / "all.safetensors"
    assert _call(monkeypatch, "convert", newest, out) == 0
    loaded = load_file(out)
    with joined_ranks() as ranks:
        opened = Checkpoint.open(newest, ranks)
    assert capsys.readouterr().out.startswith(f"{out}: {len(loaded)} tensors, ")
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        name: saved.shape for name, saved in opened.tensors.items()
    }
    for name, tensor in loaded.items():
        assert torch.equal(tensor, opened.read(name).reshape(tensor.shape)), name
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_convert_the_model_alone_in_a_dtype(
    newest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    out = tmp_path / "model.safetensors"
    assert _call(monkeypatch, "convert", newest, out, "--model-only", "--dtype", dtype) == 0
    loaded = load_file(out)
    assert {tensor.dtype for tensor in loaded.values()} == {getattr(torch, dtype)}
    assert not [name for name in loaded if "exp_avg" in name or name.startswith("optimizer")]
    with joined_ranks() as ranks:
        opened = Checkpoint.open(newest, ranks)
    assert loaded.keys() == {
        n.removeprefix("model.") for n in opened.tensors if n.startswith("model.")
    }
    assert torch.equal(loaded[TABLE], opened.read(f"model.{TABLE}").to(getattr(torch, dtype)))


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['torchrec-pt', 'checkpoint', 'inspect', '--help']\n"
        "from torchrec_pt import cli\n"
        "try: cli.main()\n"
        "except SystemExit: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr
    assert "--json" in done.stdout
