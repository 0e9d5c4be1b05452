"""Through TorchRec's pipeline a training is what it is by the plain loop."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import FEATURES, tiny_config
from tests.training.both_ways import POISONED_STEP, going, recorded
from torchrec_pt import pipeline
from torchrec_pt.build import build_learner
from torchrec_pt.config import TrainConfig
from torchrec_pt.data.batch import Batch
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.optim import schedule_factor
from torchrec_pt.train import Trainer
from torchrec_pt.train_pipeline import TakenStep, suits_pipeline

WORKER = Path(__file__).parent / "both_ways.py"
# 37 users in batches of 10: the last is 7, which two ranks do not divide.
SETTINGS = {
    "epochs": 2,
    "batch_size": 10,
    "learning_rate": 0.01,
    "warmup_steps": 3,
    "schedule": "linear",
}
STEPS_PER_EPOCH, NUM_STEPS = 4, 8

NEXT = {"name": "next_item"}
MASKED = {"name": "masked_item"}
VIEWS = {"name": "contrastive", "weight": 0.5, "learn_temperature": True}
OWN = {"negatives": {"num": 7}}
SHARED = {"negatives": {"num": 13, "shared": True}}
ROW_WISE = {"placement": "row_wise", "optimizer": "rowwise_adagrad"}
TABLE_WISE = {"placement": "table_wise", "optimizer": "adagrad"}


def _cases(folder: Path) -> dict[str, dict[str, Any]]:
    def model(table: dict[str, Any], attention: str) -> dict[str, Any]:
        layers = {"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0.2}
        return {**layers, "attention": attention, "item_table": table}

    def pretrain(
        table: dict[str, Any], *objectives: dict[str, Any], attention: str = "causal"
    ) -> dict[str, Any]:
        settings = {**SETTINGS, "objectives": objectives}
        config = tiny_config(folder, model=model(table, attention), pretrain=settings)
        return config.model_dump(mode="json")

    def ctr(table: dict[str, Any]) -> dict[str, Any]:
        task = {"ctr": {**SETTINGS, "positive_rating": 3, "cuts_per_user": 2}}
        config = tiny_config(folder, FEATURES, model=model(table, "causal"), finetune=task)
        return config.model_dump(mode="json")

    both = "bidirectional"
    cases = {}
    for table in (ROW_WISE, TABLE_WISE):
        at = table["placement"]
        cases[f"{at}, sampled"] = pretrain(table, {**NEXT, **OWN})
        cases[f"{at}, catalogue"] = pretrain(table, NEXT)
        cases[f"{at}, ctr"] = ctr(table)
    cases["row_wise, contrastive"] = pretrain(ROW_WISE, VIEWS, attention=both)
    cases["table_wise, several"] = pretrain(TABLE_WISE, {**MASKED, **SHARED}, VIEWS, attention=both)
    column_wise = {"placement": "column_wise", "optimizer": "sgd"}
    cases["column_wise, several"] = pretrain(column_wise, MASKED, VIEWS, attention=both)
    cases["row_wise, bf16"] = pretrain(ROW_WISE, NEXT)
    cases["row_wise, bf16"]["pretrain"]["precision"] = "bf16"
    cases["poisoned"] = pretrain(ROW_WISE, {**MASKED, **OWN}, attention=both)
    return cases


CASES = [name for name in _cases(Path()) if name != "poisoned"]
NUM_RANKS = [1, 2]


@pytest.fixture(scope="module")
def results(
    cycle_with_features: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, Any]]:
    """Number of ranks -> the results of every case by each way; each number is run once."""

    @functools.cache
    def run(num_ranks: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("both_ways")
        cases, out = folder / "cases.json", folder / "out.json"
        cases.write_text(json.dumps(_cases(folder)))
        launcher = [sys.executable]
        if num_ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", str(num_ranks)]
        command = [*launcher, str(WORKER), str(cycle_with_features.path), str(cases), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_trains_bit_for_bit_as_the_plain_loop(
    results: Callable[[int], dict[str, Any]], num_ranks: int, case: str
) -> None:
    plain, piped = (results(num_ranks)[f"{way} {case}"] for way in ("plain", "pipeline"))
    for what in ("means", "rates"):
        assert [step[what] for step in piped["steps"]] == [step[what] for step in plain["steps"]]
    assert piped["losses"] == plain["losses"]
    assert plain["losses"][0][0] != plain["losses"][0][-1]
    assert piped["curve"] == plain["curve"]
    assert any("item.weight" in name for name in plain["checkpoints"])
    assert piped["checkpoints"] == plain["checkpoints"]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_runs_two_batches_ahead_and_counts_none_of_them(
    results: Callable[[int], dict[str, Any]], num_ranks: int, case: str
) -> None:
    steps = results(num_ranks)[f"pipeline {case}"]["steps"]
    assert [step["lookup"] for step in steps] == ["PipelinedForward"] * NUM_STEPS
    assert [step["step"] for step in steps] == list(range(NUM_STEPS))
    assert [step["done"] for step in steps] == list(range(NUM_STEPS))
    # Nothing of the next epoch is drawn before this one is over.
    assert [step["drawn"] for step in steps] == [3, 4, 4, 4, 7, 8, 8, 8]


@pytest.mark.parametrize("way", ["plain", "pipeline"])
def test_every_step_has_its_learning_rate(
    results: Callable[[int], dict[str, Any]], way: str
) -> None:
    config = TrainConfig.model_validate(SETTINGS)
    expected = [0.01 * schedule_factor(config, step, NUM_STEPS) for step in range(NUM_STEPS)]
    for step, rate in zip(results(1)[f"{way} row_wise, sampled"]["steps"], expected, strict=True):
        # One group of AdamW, since nothing decays, and the fused one, in float32.
        assert step["rates"] == pytest.approx([rate] * 2, rel=1e-6)


@pytest.mark.parametrize("way", ["plain", "pipeline"])
def test_every_rank_names_the_rows_of_the_rank_whose_loss_is_not_finite(
    results: Callable[[int], dict[str, Any]], way: str
) -> None:
    first, second = results(2)[f"{way} poisoned"]
    assert first == second
    assert f"not finite at step {POISONED_STEP} (masked_item nan); rank 1 held" in first
    assert "last good checkpoint" in first
    assert "step-00000004" in first


# --- in this process ----------------------------------------------------------------------------


@pytest.mark.parametrize("table", [ROW_WISE, TABLE_WISE, {}], ids=["row", "table", "replicated"])
def test_a_sharded_table_on_cuda_goes_through_the_pipeline(
    cycle: PreparedDataset, cycle_folder: Path, table: dict[str, Any]
) -> None:
    model = {"dim": 16, "num_layers": 1, "max_length": 8, "item_table": table}
    config = tiny_config(cycle_folder, model=model)
    with joined_ranks() as ranks:
        learner = build_learner(config, TrainConfig(), [], cycle, ranks).learner
        assert suits_pipeline(learner, torch.device("cuda", 0)) == bool(table)
        assert not suits_pipeline(learner, ranks.device)


def test_a_killed_pipeline_resumes_and_ends_as_the_uninterrupted_one(
    cycle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"dim": 16, "num_layers": 1, "max_length": 8, "item_table": ROW_WISE}
    settings = {**SETTINGS, "objectives": [{**MASKED, **OWN}]}
    configs = [
        tiny_config(cycle_folder, model=model, pretrain=settings).model_copy(
            update={"run_dir": tmp_path / name}
        )
        for name in ("a", "b")
    ]
    forward = Trainer._forward

    def dies(self: Trainer, batch: Batch) -> tuple[Tensor, TakenStep]:
        if batch.step == 6:
            raise KeyboardInterrupt
        return forward(self, batch)

    for config in configs:
        pipeline.prepare(config)
    with going("pipeline"):
        expected = pipeline.pretrain(configs[0])
        monkeypatch.setattr(Trainer, "_forward", dies)
        with pytest.raises(KeyboardInterrupt):
            pipeline.pretrain(configs[1])
        monkeypatch.undo()
        with recorded() as steps:
            resumed = pipeline.pretrain(configs[1])
    assert [step["step"] for step in steps] == [4, 5, 6, 7]
    assert resumed.values["curve"] == expected.values["curve"]


def test_a_loss_that_is_not_finite_updates_nothing(
    cycle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"dim": 16, "num_layers": 1, "max_length": 8, "item_table": ROW_WISE}
    config = tiny_config(cycle_folder, model=model).model_copy(update={"run_dir": tmp_path})
    pipeline.prepare(config)
    forward = Trainer._forward
    trainers: list[Trainer] = []

    def poisons(self: Trainer, batch: Batch) -> tuple[Tensor, TakenStep]:
        if batch.step == POISONED_STEP:
            with torch.no_grad():
                self.learner.backbone.mask.fill_(torch.nan)
            trainers.append(self)
        return forward(self, batch)

    monkeypatch.setattr(Trainer, "_forward", poisons)
    with going("pipeline"), pytest.raises(RuntimeError, match=f"at step {POISONED_STEP} "):
        pipeline.pretrain(config)
    (trainer,) = trainers
    assert trainer.position.step == POISONED_STEP
    state = trainer.model.state_dict()
    (table,) = (state[name].local_shards()[0].tensor for name in state if "item.weight" in name)
    assert torch.isfinite(table).all()
