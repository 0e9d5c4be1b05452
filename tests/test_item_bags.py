"""An item table of bags of one item trains as the plain one, and plans as CUDA would have it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchrec.distributed import comm

from tests.conftest import tiny_config
from torchrec_pt import build, pipeline, sharding, train
from torchrec_pt.config import RunConfig, TrainConfig
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.item_bags import ItemBagsSharder
from torchrec_pt.models.item_table import ItemTable
from torchrec_pt.placement import POOLED, Placement, settle_placement
from torchrec_pt.train import Trainer


def test_lookups_and_updates_of_two_nodes_of_two_ranks_are_those_of_row_wise() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "4", str(Path(__file__).parent / "pooled_ranks.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


# --- training -----------------------------------------------------------------------------------


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchRec and we refuse these kinds on CPU."""
    for name in ("_INTRA_PG", "_CROSS_PG"):
        monkeypatch.setattr(comm, name, None)
    monkeypatch.setattr(ItemBagsSharder, "sharding_types", lambda *_: [*POOLED, "grid_shard"])
    monkeypatch.setattr(
        build, "settle_placement", lambda *given: settle_placement(*given[:3], "cuda")
    )


class _KilledError(Exception):
    pass


def _config(folder: Path, run_dir: Path, placement: str, optimizer: str) -> RunConfig:
    table = {"placement": placement, "optimizer": optimizer, "learning_rate": 0.05}
    model = {"dim": 16, "num_layers": 1, "max_length": 8, "item_table": table}
    pretrain = {
        "epochs": 2,
        "batch_size": 10,
        "objectives": [{"name": "masked_item"}],
        "checkpoint_every": 2,
    }
    config = tiny_config(folder, model=model, pretrain=pretrain)
    return config.model_copy(update={"run_dir": run_dir})


def _tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run_dir / "pretrain/checkpoints").iterdir())[-1]
    return {n: v for file in newest.glob("*.safetensors") for n, v in load_file(file).items()}


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(
    ("first", "second", "optimizer"),
    [
        ("table_row_wise", "table_row_wise", "rowwise_adagrad"),
        ("row_wise", "table_row_wise", "rowwise_adagrad"),
        ("grid", "replicated", "adagrad"),
    ],
)
def test_a_stage_begun_under_one_placement_ends_under_another_as_one_under_row_wise(
    cycle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
    optimizer: str,
) -> None:
    whole = _config(cycle_folder, tmp_path / "a", "row_wise", optimizer)
    pipeline.prepare(whole)
    expected = pipeline.pretrain(whole)
    shutil.copytree(whole.prepared_dir, tmp_path / "b/prepared")
    real, steps = Trainer.step, 0

    def dies(self: Trainer, rows: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise _KilledError
        return real(self, rows)

    begun = _config(cycle_folder, tmp_path / "b", first, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", dies)
        with pytest.raises(_KilledError):
            pipeline.pretrain(begun)
    # As a sharded table trains on CUDA.
    monkeypatch.setattr(
        train, "suits_pipeline", lambda learner, _: learner.backbone.items.is_pooled
    )
    resumed = pipeline.pretrain(_config(cycle_folder, tmp_path / "b", second, optimizer))
    assert resumed.fingerprint == expected.fingerprint
    torch.testing.assert_close(_tensors(tmp_path / "b"), _tensors(tmp_path / "a"))
    plan = json.loads((tmp_path / "b/pretrain/plan.json").read_text())
    assert plan[0]["kind"] == {"grid": "grid_shard"}.get(second, second)


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ranks_of_node", "nodes", "expected"),
    [
        ("table_row_wise", 2, 2, [[50, 64]] * 2),
        ("grid", 2, 2, [[50, 32]] * 4),
        ("table_row_wise", 4, 1, [[25, 64]] * 4),
        ("grid", 4, 1, [[25, 64]] * 4),
        ("table_row_wise", 1, 1, [[100, 64]]),
        ("grid", 1, 1, [[100, 64]]),
    ],
)
def test_the_planner_has_a_plan_for_gpus(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    ranks_of_node: int,
    nodes: int,
    expected: list[list[int]],
) -> None:
    properties = type("Properties", (), {"total_memory": 80 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    class PlannedError(Exception):
        pass

    def stop(*_: Any, plan: Any, **__: Any) -> None:
        raise PlannedError(plan)

    monkeypatch.setattr(sharding, "DistributedModelParallel", stop)
    ranks = Ranks(0, ranks_of_node * nodes, ranks_of_node, torch.device("cuda"))
    table, placement = nn.Sequential(ItemTable(100, 64)), Placement(kind, "adagrad")
    with joined_ranks(), pytest.raises(PlannedError) as caught:
        sharding.shard(table, placement, TrainConfig(), ranks)
    (tables,) = caught.value.args[0].plan.values()
    assert [part.shard_sizes for part in tables["item"].sharding_spec.shards] == expected
    assert tables["item"].sharding_type == {"grid": "grid_shard"}.get(kind, kind)
