"""In bf16 a training learns what it learns in float32, and leaves float32 behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import FEATURES, tiny_config
from tests.training.both_ways import train_case
from torchrec_pt.build import build_task, load_learner
from torchrec_pt.checkpoint import Checkpoint, saved
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.models.precision import multiply_in_bf16
from torchrec_pt.runs import StageResult
from torchrec_pt.validation import validation

WORKER = Path(__file__).parent / "losses.py"

STEPS = {"batch_size": 10, "learning_rate": 0.01, "warmup_steps": 2}
TRANSFORMER = {"dim": 16, "num_layers": 2, "max_length": 8, "dropout": 0.2}
CAUSAL = {**TRANSFORMER, "attention": "causal"}
TOWERS = {"backbone": "two_tower", "dim": 16, "max_length": 8, "hidden_dims": [16]}
ROW_WISE = {"item_table": {"placement": "row_wise", "optimizer": "rowwise_adagrad"}}
VIEWS = {"name": "contrastive", "weight": 0.5, "learn_temperature": True}
PAIRS = {"name": "contrastive", "pairs": "user_item"}
NEXT = {"name": "next_item", "negatives": {"num": 7}}

# Model, and the objectives of a pretraining or the name and settings of a task
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | tuple[str, dict[str, Any]]]] = {
    "masked + views": (TRANSFORMER, [{"name": "masked_item"}, VIEWS]),
    "next, sampled": (CAUSAL, [NEXT]),
    "next, row_wise": ({**CAUSAL, **ROW_WISE}, [{"name": "next_item"}]),
    "pairs": (TOWERS, [PAIRS]),
    "softmax": (TRANSFORMER, ("ranking", {"loss": "softmax"})),
    "bpr": (TOWERS, ("ranking", {"loss": "bpr"})),
    "ctr": (CAUSAL, ("ctr", {"positive_rating": 3, "cuts_per_user": 2})),
    # Of all others, so that each epoch asks for as many: the loss is over the expected number.
    "rating": ({**TOWERS, **ROW_WISE}, ("rating", {"targets_per_cut": 3, "context": "others"})),
}


def _config(case: str, folder: Path, **train: Any) -> RunConfig:
    model, what = CASES[case]
    train = {**STEPS, **train}
    stage: dict[str, Any] = {"pretrain": {**train, "objectives": what}}
    if isinstance(what, tuple):
        stage = {"finetune": {what[0]: {**train, **what[1]}}}
    return tiny_config(folder, FEATURES, model=model, **stage)


def _train(config: RunConfig, dataset: PreparedDataset) -> StageResult:
    with joined_ranks() as ranks:
        return train_case(config.model_dump(mode="json"), dataset, ranks)


@pytest.mark.parametrize("case", list(CASES))
def test_bf16_learns_as_float32_and_leaves_float32(
    cycle_with_features: PreparedDataset, tmp_path: Path, case: str
) -> None:
    curves, folders = {}, {}
    for precision in ("float32", "bf16"):
        config = _config(case, tmp_path / precision, epochs=6, precision=precision)
        result = _train(config, cycle_with_features)
        curves[precision] = [sum(entry["losses"].values()) for entry in result.values["curve"][1:]]
        folders[precision] = result.folder
    assert curves["bf16"] != curves["float32"]
    assert curves["bf16"][-1] < curves["bf16"][0]
    # A number has 8 bits, 4e-3, in bfloat16; the mean of an epoch was up to 1.1e-3 off.
    np.testing.assert_allclose(curves["bf16"], curves["float32"], rtol=5e-3)
    with joined_ranks() as ranks:
        found = Checkpoint.open(saved(folders["bf16"] / "checkpoints")[-1], ranks).tensors
    assert {t.dtype for t in found.values() if t.dtype.is_floating_point} == {torch.float32}


@pytest.mark.parametrize("case", ["masked + views", "ctr"])
def test_validation_is_in_float32(
    cycle_with_features: PreparedDataset, tmp_path: Path, case: str
) -> None:
    """The metrics are those of the float32 model that a checkpoint is loaded into."""
    config = _config(case, tmp_path, epochs=1, precision="bf16")
    result = _train(config, cycle_with_features)
    with joined_ranks() as ranks:
        tasks = [] if case != "ctr" else [build_task(config, "ctr", cycle_with_features)]
        newest = saved(result.folder / "checkpoints")[-1]
        learner = load_learner(config, newest, cycle_with_features, ranks, tasks)
        found = validation(config, cycle_with_features, learner, ranks)()
    # The GAUC of users with one row each is NaN.
    np.testing.assert_equal(found, result.values["curve"][-1]["metrics"])


def test_a_linear_layer_multiplies_in_bf16_while_it_trains_and_keeps_float32_weights() -> None:
    layer = nn.Linear(8, 3)
    x = torch.randn(5, 8)
    expected = layer(x)
    weight = layer.weight.detach().bfloat16().double()
    exact = x.bfloat16().double() @ weight.T + layer.bias.detach().bfloat16()
    multiply_in_bf16(layer)
    out = layer(x)
    # Rounded twice at most, each time by half of 2^-7 of the number
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-8)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}
    assert layer.eval()(x).equal(expected)


# Each rank rounds its sum of a weight's gradient to 8 bits, where one process rounds the whole sum,
# and AdamW divides each element by its own size. The losses of 8 steps were up to 9e-4 apart; one
# rank's gradient counted twice gives 2.6e-3 (bpr) and, for the others, 1.6e-2 and more.
LOSSES_AGREE = 2e-3


def test_ranks_train_as_one_process(cycle_with_features: PreparedDataset, tmp_path: Path) -> None:
    cases = {
        name: {"config": _config(name, tmp_path, precision="bf16").model_dump(mode="json")}
        for name in CASES
    }
    asked = tmp_path / "cases.json"
    asked.write_text(json.dumps(cases))
    losses = []
    for num_ranks in (1, 2):
        out = tmp_path / f"{num_ranks}.json"
        launcher = [sys.executable]
        if num_ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, str(WORKER), str(cycle_with_features.path), str(asked), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        losses.append(json.loads(out.read_text()))
    one, two = losses
    for name in CASES:
        np.testing.assert_allclose(
            two[name]["losses"], one[name]["losses"], rtol=LOSSES_AGREE, err_msg=name
        )
