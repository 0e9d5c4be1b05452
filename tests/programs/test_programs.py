"""A program answers as the library does, whatever the model; before it is traced."""

from __future__ import annotations

import pytest
import torch

from tests.programs.answers import answers, arguments, worst
from tests.programs.cases import BACKBONES, CLOSE, TASKS, learner_of, programs
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.int8 import quantize_tables
from torchrec_pt.learner import Learner


def disagreements(learner: Learner, data: PreparedDataset) -> dict[str, float]:
    """Program -> largest difference from the library's answers, of those above CLOSE."""
    found = programs(learner, data)
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
