"""What fine-tuning may change of a pretrained model, how fast and from when on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import FEATURES, tiny_config
from torchrec_pt import pipeline
from torchrec_pt.build import Built, build_learner, build_task
from torchrec_pt.checkpoint import Checkpoint, saved
from torchrec_pt.config import RunConfig, transfer_of
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import join_ranks, joined_ranks
from torchrec_pt.layer_rates import layer_rates
from torchrec_pt.optim import Optimizers
from torchrec_pt.rng import RowNoise
from torchrec_pt.runs import load_result
from torchrec_pt.train import Trainer

WORKER = Path(__file__).parent / "finetune_ranks.py"
STEPS_AN_EPOCH = 4
STEPS = {
    "epochs": 3,
    "batch_size": 10,
    "learning_rate": 0.05,
    "warmup_steps": 0,
    "schedule": "constant",
    "weight_decay": 0.1,
    "keep_checkpoints": 9,
}
CTR = {**STEPS, "positive_rating": 3}
TABLES: dict[str, dict[str, Any]] = {
    "replicated": {"placement": "replicated"},
    "own": {"placement": "replicated", "optimizer": "rowwise_adagrad"},
    "row_wise": {"placement": "row_wise", "optimizer": "rowwise_adagrad"},
}
TABLE, MASK, BLOCK = "backbone.items.collection", "backbone.mask", "backbone.blocks.0.qkv.weight"
CONTENT, HEAD = "backbone.content", "objectives.ctr.head"

FROZEN_TABLE = {"freeze": "item_table"}
PROBE = {"linear_probe": True}
GRADUAL = {"unfreeze_every": 1, "backbone_rate": 0.5, "layer_decay": 0.5}
AVERAGED = {"clip_norm": 1.0, "average_decay": 0.9}
# Name -> table, settings of the task
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "table replicated": ("replicated", {"ranking": {**STEPS, **AVERAGED}}),
    "table own": ("own", {"ranking": {**STEPS, "loss": "bpr"}}),
    "table row_wise": ("row_wise", {"ranking": STEPS}),
    "probe replicated": ("replicated", {"ctr": {**CTR, **AVERAGED}}),
    "probe row_wise": ("row_wise", {"ctr": CTR}),
    "gradual replicated": ("replicated", {"ctr": {**CTR, **AVERAGED}}),
    "gradual own": ("own", {"ctr": CTR}),
    "gradual row_wise": ("row_wise", {"ctr": CTR}),
    "gradual, no head, row_wise": ("row_wise", {"ranking": STEPS}),
}
TRANSFERS = {"table": FROZEN_TABLE, "probe": PROBE, "gradual": GRADUAL, "gradual,": GRADUAL}


def _config(
    cycle_folder: Path, run_dir: Path, table: str = "replicated", **sections: Any
) -> RunConfig:
    model = {"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0.3, "row_dropout": 0.2}
    return tiny_config(
        cycle_folder,
        FEATURES,
        run_dir=run_dir,
        data={
            **tiny_config(cycle_folder, FEATURES).data.model_dump(),
            "prepared": cycle_folder / "prepared_with_features",
        },
        model={**model, "item_table": TABLES[table]},
        **sections,
    )


def _task(settings: dict[str, Any], transfer: dict[str, Any]) -> dict[str, Any]:
    ((task, values),) = settings.items()
    return {task: {**values, "transfer": transfer}}


@pytest.fixture(scope="module")
def pretrained(
    cycle_folder: Path, cycle_with_features: PreparedDataset, tmp_path_factory: Any
) -> Path:
    """The folder of a stage."""
    config = _config(cycle_folder, tmp_path_factory.mktemp("source"))
    return pipeline.pretrain(config).folder


Tuned = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def tuned(cycle_folder: Path, pretrained: Path, tmp_path_factory: Any) -> Tuned:
    """Number of ranks, case -> the folder of its fine-tuned stage."""
    folder = tmp_path_factory.mktemp("tuned")

    @cache
    def launch(num_ranks: int) -> None:
        configs = []
        for name, (table, settings) in CASES.items():
            start = {"pretrain": None, "finetune": {"start_from": pretrained}}
            config = _config(cycle_folder, folder / str(num_ranks) / name, table, **start)
            raw = config.model_dump(mode="json")
            raw["finetune"] |= _task(settings, TRANSFERS[name.split(" ")[0]])
            configs.append(raw)
        asked = folder / f"{num_ranks}.json"
        asked.write_text(json.dumps(configs))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        command = [sys.executable, *(launcher if num_ranks > 1 else ()), str(WORKER), str(asked)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]

    def folder_of(num_ranks: int, case: str) -> Path:
        launch(num_ranks)
        (task,) = CASES[case][1]
        return folder / str(num_ranks) / case / "finetune" / task / "pretrained"

    return folder_of


def _tensors(path: Path) -> dict[str, Tensor]:
    with joined_ranks() as ranks:
        checkpoint = Checkpoint.open(path, ranks)
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str) -> list[str]:
    """The tensors under a prefix, and their optimizers' states, that have other bits."""
    kinds = [f"{kind}.{prefix}" for kind in ("model", "raw", "optimizer")]
    names = [name for name in after if name.startswith(tuple(kinds))]
    assert names, prefix
    return [name for name in names if not after[name].equal(before[name])]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_what_is_frozen_keeps_its_bits_and_the_rest_trains(
    tuned: Tuned, pretrained: Path, num_ranks: int, case: str
) -> None:
    """Of the states of its optimizer as well; weights decay, are clipped and averaged."""
    start, *epochs = [_tensors(p) for p in saved(tuned(num_ranks, case) / "checkpoints")]
    assert len(epochs) == 3
    result = load_result(pretrained)
    assert result is not None
    source = _tensors(result.checkpoint)
    for name in source.keys() & start.keys():
        assert not name.startswith("model.") or start[name].equal(source[name]), name
    before = start
    for epoch, after in enumerate(epochs):
        trains = {TABLE: False, CONTENT: True, MASK: True, BLOCK: True}
        if case.startswith("probe"):
            trains = dict.fromkeys(trains, False)
        if case.startswith("gradual"):
            depth = epoch + ("no head" in case)
            trains = dict.fromkeys((TABLE, CONTENT, MASK), depth > 1) | {BLOCK: depth > 0}
        for prefix, does_train in trains.items():
            assert bool(_changed(before, after, prefix)) == does_train, (epoch, prefix)
        if "ctr" in CASES[case][1]:
            assert _changed(before, after, HEAD)
        before = after


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_fine_tune_as_one(tuned: Tuned, case: str) -> None:
    one, two = (load_result(tuned(num_ranks, case)) for num_ranks in (1, 2))
    assert one is not None
    assert two is not None
    for first, second in zip(one.values["curve"], two.values["curve"], strict=True):
        # As in test_ranks, over 12 steps in place of 8.
        assert second["losses"] == pytest.approx(first["losses"], rel=1e-4)
    assert one.values["transfer"] == two.values["transfer"]


# --- in one process -------------------------------------------------------------------------------


def _built(config: RunConfig, dataset: PreparedDataset) -> tuple[Built, Optimizers]:
    ((task, train),) = config.finetune.tasks.items()
    objectives = [build_task(config, task, dataset)]
    built = build_learner(config, train, objectives, dataset, join_ranks())
    names = built.model.state_dict()
    layers = layer_rates(built.learner, names, transfer_of(train), STEPS_AN_EPOCH)
    return built, Optimizers(built.model, train, built.placement, 12, layers)


@pytest.mark.parametrize("table", TABLES)
def test_each_group_of_layers_has_its_rate(
    cycle_folder: Path, cycle_with_features: PreparedDataset, tmp_path: Path, table: str
) -> None:
    transfer = {"backbone_rate": 0.5, "layer_decay": 0.1}
    config = _config(cycle_folder, tmp_path, table, finetune=_task({"ctr": CTR}, transfer))
    with joined_ranks():
        built, optimizers = _built(config, cycle_with_features)
        optimizers.prepare(0)
        of: dict[int, float] = {}
        for optimizer in (*optimizers.dense, optimizers.fused):
            for group in optimizer.param_groups:
                of |= {id(parameter): group["lr"] for parameter in group["params"]}
        rates = {name: of[id(p)] for name, p in optimizers.parameters.items()}
        rates |= {TABLE: optimizers.fused.param_groups[0]["lr"]} if table == "row_wise" else {}
        assert len(built.learner.backbone.layers()) == 2
        for name, rate in rates.items():
            expected = 0.05
            if name.startswith("backbone."):
                is_top = name.startswith(("backbone.blocks.", "backbone.norm."))
                expected *= 0.5 if is_top else 0.05
            assert rate == pytest.approx(expected), name


def test_a_probe_hears_no_dropout_in_its_backbone_and_trains_a_linear_head(
    cycle_folder: Path, cycle_with_features: PreparedDataset, tmp_path: Path
) -> None:
    config = _config(cycle_folder, tmp_path, finetune=_task({"ctr": CTR}, PROBE))
    assert config.finetune.ctr is not None
    assert config.finetune.ctr.hidden_dims == ()
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    with joined_ranks():
        built, optimizers = _built(config, cycle_with_features)
        built.model.train()
        backbone = built.learner.backbone
        assert not backbone.training
        assert built.learner.objectives["ctr"].training
        assert {name.split(".")[0] for name in optimizers.parameters} == {"objectives"}
        ids = torch.tensor([3, 1, 2])
        noise = RowNoise(0, 0, torch.arange(3))
        rows = backbone.represent(ids, backbone.items.weight[ids], noise)
        assert rows.equal(backbone.represent(ids, backbone.items.weight[ids]))
        history = Jagged(rows, torch.tensor([0, 3]))
        users = torch.tensor([0])
        quiet = backbone.encode_users(users, history)
        assert quiet.equal(backbone.encode_users(users, history, RowNoise(0, 0, users)))


def test_a_probe_of_ranking_trains_a_map_of_the_users_vector_alone(
    cycle_folder: Path, cycle_with_features: PreparedDataset, pretrained: Path, tmp_path: Path
) -> None:
    finetune = {"start_from": pretrained, **_task({"ranking": STEPS}, PROBE)}
    config = _config(cycle_folder, tmp_path, pretrain=None, finetune=finetune)
    assert config.finetune.ranking is not None
    assert config.finetune.ranking.head == "linear"
    with joined_ranks():
        _, optimizers = _built(config, cycle_with_features)
        assert set(optimizers.parameters) == {"objectives.ranking.head.map.weight"}
    curve = pipeline.finetune(config)["ranking"]["pretrained"].values["curve"]
    assert len(curve) == 4
    assert curve[-1]["losses"]["ranking"] < curve[1]["losses"]["ranking"]


@pytest.mark.parametrize("table", TABLES)
def test_unfreezing_goes_on_in_the_middle_of_an_epoch_to_the_same_bits(
    cycle_folder: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: str,
) -> None:
    def config(run: str) -> RunConfig:
        finetune = _task({"ctr": {**CTR, "checkpoint_every": 3}}, GRADUAL)
        sections = {"pretrain": None, "finetune": {"start_from": pretrained, **finetune}}
        return _config(cycle_folder, tmp_path / run, table, **sections)

    whole = pipeline.finetune(config("whole"))["ctr"]["pretrained"]
    real = Trainer.step

    def dies(self: Trainer, *batches: Any) -> Any:
        if self.position.step == 7:  # of 4 an epoch: the block trains, the table does not yet
            raise KeyboardInterrupt
        return real(self, *batches)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.finetune(config("broken"))
    monkeypatch.undo()
    resumed = pipeline.finetune(config("broken"))["ctr"]["pretrained"]
    # The GAUC of users with one row each is NaN.
    np.testing.assert_equal(resumed.values["curve"], whole.values["curve"])
    last, again = (_tensors(saved(r.folder / "checkpoints")[-1]) for r in (whole, resumed))
    assert last.keys() == again.keys()
    assert [name for name in last if not last[name].equal(again[name])] == []


def test_the_control_trains_all_of_it_at_one_rate(
    cycle_folder: Path, cycle_with_features: PreparedDataset, tmp_path: Path
) -> None:
    """So that other options of transfer leave the control as it is."""
    results = []
    for transfer in (FROZEN_TABLE, GRADUAL):
        task = _task({"ranking": {**STEPS, "epochs": 1, "control": "scratch"}}, transfer)
        config = _config(cycle_folder, tmp_path, finetune=task)
        pipeline.pretrain(config)
        results.append(pipeline.finetune(config)["ranking"])
    assert results[0]["scratch"].values == results[1]["scratch"].values
    assert results[0]["pretrained"].fingerprint != results[1]["pretrained"].fingerprint
    start, end = (_tensors(p) for p in saved(results[0]["scratch"].folder / "checkpoints"))
    assert _changed(start, end, TABLE)


def test_a_task_without_a_head_is_not_left_with_nothing_to_train(
    cycle_folder: Path, cycle_with_features: PreparedDataset, tmp_path: Path
) -> None:
    task = _task({"ranking": STEPS}, {"freeze": "backbone"})
    config = _config(cycle_folder, tmp_path, finetune=task)
    with joined_ranks(), pytest.raises(ValueError, match=r"finetune\.ranking\.transfer: freezes"):
        _built(config, cycle_with_features)
