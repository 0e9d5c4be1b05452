"""A program answers as the library does, whatever the model; before it is traced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tests.programs.answers import (
    ALL_FEATURES,
    answers,
    arguments,
    random_learner,
    rich_data,
    worst,
)
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.int8 import quantize_tables
from torchrec_pt.learner import Learner
from torchrec_pt.programs.encoders import Program
from torchrec_pt.programs.export import programs_of
from torchrec_pt.programs.ports import FeatureInputs

# float32 sums in another order; numbers are divided by the largest answer.
CLOSE = 3e-6

BACKBONES: dict[str, dict[str, Any]] = {
    "bidirectional": {"num_layers": 2},
    "causal": {"attention": "causal", "num_layers": 2, "similarity": "cosine"},
    "rotary": {"positions": "rotary"},
    "relative_time": {"positions": "relative_time"},
    "causal relative_time": {"positions": "relative_time", "attention": "causal"},
    "without content": {"item_content": False},
    "two_tower": {"backbone": "two_tower", "hidden_dims": [8]},
    "autoencoder": {"backbone": "autoencoder", "hidden_dims": [8, 12]},
    "linear autoencoder": {"backbone": "autoencoder", "hidden_dims": [], "variational": True},
}
EVERY_LAYER = ["inner", "outer", "hadamard", "concat", "fm", "cross", "dot"]
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "inner": ("ranking", {}),
    "linear": ("ranking", {"head": "linear"}),
    "mlp": ("ranking", {"head": "mlp", "loss": "bpr", "interactions": EVERY_LAYER}),
    "ctr": ("ctr", {"positive_rating": 3, "interactions": EVERY_LAYER}),
    "focal ctr": ("ctr", {"positive_rating": 3, "loss": "focal", "attention_heads": 4}),
    "clicks alone": ("ctr", {"negatives": {"num": 2}}),
    "rating": ("rating", {"context_length": 3}),
    "long context": ("rating", {"context_length": 12, "context": "others"}),
}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with joined_ranks():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return rich_data(tmp_path_factory.mktemp("rich"))


def run_config(backbone: str, task: str | None) -> RunConfig:
    model = {"dim": 16, "num_layers": 1, "max_length": 6, **BACKBONES[backbone]}
    if "backbone" in model:
        del model["num_layers"]
    tasks = {} if task is None else {TASKS[task][0]: TASKS[task][1]}
    return tiny_config(Path(), ALL_FEATURES, model=model, finetune=tasks)


def learner_of(backbone: str, task: str | None, data: PreparedDataset) -> Learner:
    name = None if task is None else TASKS[task][0]
    return random_learner(run_config(backbone, task), data, name)


def programs(
    learner: Learner, data: PreparedDataset, *, is_int8: bool = False
) -> dict[str, Program]:
    features = {of: FeatureInputs(data, of) for of in ("user", "item", "interaction")}
    return programs_of(learner, features, is_int8=is_int8)


def disagreements(learner: Learner, data: PreparedDataset, **options: Any) -> dict[str, float]:
    """Program -> largest difference from the library's answers, of those above CLOSE."""
    found = programs(learner, data, **options)
    expected = answers(learner, data)
    with torch.no_grad():
        differences = {
            name: worst(program(*arguments(program, expected[name][0])), *expected[name][1:])
            for name, program in found.items()
        }
    return {name: one for name, one in differences.items() if not one < CLOSE}


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("task", [None, "mlp", "rating"])
def test_programs_answer_as_every_backbone_does(
    data: PreparedDataset, backbone: str, task: str | None
) -> None:
    assert disagreements(learner_of(backbone, task, data), data) == {}


@pytest.mark.parametrize("task", list(TASKS))
def test_programs_answer_as_every_task_does(data: PreparedDataset, task: str) -> None:
    assert disagreements(learner_of("relative_time", task, data), data) == {}


@pytest.mark.parametrize("task", ["mlp", "ctr"])
def test_int8_programs_answer_as_the_model_with_quantized_tables_does(
    data: PreparedDataset, task: str
) -> None:
    whole, learner = (learner_of("two_tower", task, data) for _ in range(2))
    quantize_tables(learner)
    expected = answers(learner, data)
    with torch.no_grad():
        for name, program in programs(whole, data, is_int8=True).items():
            got = program(*arguments(program, expected[name][0]))
            assert worst(got, *expected[name][1:]) < CLOSE
            assert any(buffer.dtype == torch.uint8 for buffer in program.buffers())


def test_it_makes_no_difference_on_which_side_nothing_stands(data: PreparedDataset) -> None:
    learner = learner_of("relative_time", "rating", data)
    (program,) = programs(learner, data).values()
    given = answers(learner, data)["rating"][0]
    nothing = {"history": -1, "times": torch.nan, "labels": torch.nan}
    more = {
        name: torch.nn.functional.pad(given[name], (3, 2), value=fill)
        for name, fill in nothing.items()
    }
    with torch.no_grad():
        expected = program(*arguments(program, given))
        got = program(*arguments(program, {**given, **more}))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
