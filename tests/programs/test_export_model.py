"""Exported programs answer alone as the library does; int8 tables and what they cost."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from tests.conftest import tiny_config, write_cycle
from tests.programs.alone import answers_alone
from tests.programs.answers import ALL_FEATURES, answers, arguments, worst
from tests.programs.cases import BACKBONES, CLOSE, TASKS, learner_of, programs
from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import join_ranks
from torchrec_pt.int8 import quantize_tables
from torchrec_pt.learner import Learner
from torchrec_pt.programs.export import export_model
from torchrec_pt.programs.formats import SUFFIX, Format, write_program
from torchrec_pt.programs.models import load_model, used_models
from torchrec_pt.quantization import quantize_run

STEPS = {"epochs": 1, "batch_size": 10, "warmup_steps": 0, "learning_rate": 0.01}
# Compilers and runtimes other than torch's sum in an order of their own.
CLOSE_ELSEWHERE = 3 * CLOSE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run with two tasks."""
    folder = tmp_path_factory.mktemp("finished")
    write_cycle(folder / "log.tsv")
    config = tiny_config(
        folder,
        [one for one in ALL_FEATURES if one["column"] not in ("vec", "price", "town")],
        finetune={
            "ranking": {**STEPS, "head": "linear"},
            "rating": {**STEPS, "interactions": ["cross", "dot"]},
        },
    )
    pipeline.prepare(config)
    pipeline.pretrain(config)
    pipeline.finetune(config)
    return config


def assert_answers_alone(
    learner: Learner,
    data: PreparedDataset,
    format: Format,
    folder: Path,
    names: list[str],
    *,
    is_int8: bool = False,
) -> None:
    """In this format; of programs of these names, or of all."""
    found = programs(learner, data, is_int8=is_int8)
    if is_int8:
        quantize_tables(learner)
    expected = answers(learner, data)
    close = CLOSE if format == "pt2" else CLOSE_ELSEWHERE
    cases, wanted = [], []
    for name, program in found.items():
        if not names or name in names:
            (file,) = write_program(program, folder, name, [format])
            assert file.name == name + SUFFIX[format]
            cases.append((file, arguments(program, expected[name][0])))
            wanted.append(expected[name][1:])
    assert cases
    for (whole, first), (answer, counts) in zip(answers_alone(cases, folder), wanted, strict=True):
        assert worst(whole, answer, counts) < close
        assert worst(first, whole[:1], counts[:1] if counts.dim() else counts) < close


def test_a_run_exports_programs_that_answer_alone(run: RunConfig, tmp_path: Path) -> None:
    out = export_model(run.run_dir, tmp_path / "model")
    about = json.loads((out / "model.json").read_text())
    assert set(about["programs"]) == {
        "user_encoder",
        "item_encoder",
        "new_item_encoder",
        "ranking",
        "rating",
    }
    assert about["ranks_by_inner_product"]
    data = PreparedDataset.load(run.prepared_dir)
    items = pl.read_parquet(out / "items.parquet")
    assert items["id"].to_list() == list(range(data.num_items))
    assert items["external_id"].equals(data.items["external_id"])
    assert pl.read_parquet(out / "vocabulary.parquet").equals(data.vocabulary)

    cases, wanted = [], []
    for task, stage in used_models(run, data).items():
        learner = load_model(run, task, stage, data, join_ranks())
        for name, (given, answer, counts) in answers(learner, data).items():
            said = about["programs"][name]
            (file,) = said["files"]
            cases.append((out / file, [given[port["name"]] for port in said["inputs"]]))
            wanted.append((answer, counts))
    for (whole, first), (answer, counts) in zip(
        answers_alone(cases, tmp_path), wanted, strict=True
    ):
        assert worst(whole, answer, counts) < CLOSE
        assert worst(first, whole[:1], counts[:1] if counts.dim() else counts) < CLOSE


def test_onnx_answers_alone(data: PreparedDataset, tmp_path: Path) -> None:
    learner = learner_of("autoencoder", None, data)
    assert_answers_alone(learner, data, "onnx", tmp_path, ["user_encoder", "new_item_encoder"])


def test_a_compiled_package_of_int8_tables_answers_alone(
    data: PreparedDataset, tmp_path: Path
) -> None:
    learner = learner_of("bidirectional", None, data)
    assert_answers_alone(learner, data, "aoti", tmp_path, ["item_encoder"], is_int8=True)


@pytest.mark.soak
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("format", list(SUFFIX))
@pytest.mark.parametrize(
    ("backbone", "task"),
    [*((one, None) for one in BACKBONES), *(("two_tower", one) for one in TASKS)],
)
def test_every_model_answers_alone_in_every_format(
    data: PreparedDataset,
    tmp_path: Path,
    backbone: str,
    task: str | None,
    format: Format,
    is_int8: bool,
) -> None:
    learner = learner_of(backbone, task, data)
    assert_answers_alone(learner, data, format, tmp_path, [], is_int8=is_int8)


def test_int8_tables_are_exported_and_their_loss_is_measured(
    run: RunConfig, tmp_path: Path
) -> None:
    found = quantize_run(run.run_dir)
    evaluated = pipeline.evaluate(run)
    for task, one in found.items():
        expected = evaluated[task].metrics["fine-tuned"]
        assert one.float32 == {metric: expected[metric] for metric in one.float32}
        assert one.table_bytes.int8 < 0.6 * one.table_bytes.float32
        for metric, (loss, half_width) in one.loss.items():
            assert loss == pytest.approx(one.int8[metric] - one.float32[metric])
            assert half_width >= 0
    stored = json.loads((run.run_dir / "evaluate" / "int8.json").read_text())
    assert stored["rating"]["int8"] == found["rating"].int8


def test_nothing_else_is_replaced_by_an_export(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no exported model, and would be replaced"):
        export_model(run.run_dir, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        export_model(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match='formats must be of pt2, aoti, onnx, given "exe"'):
        export_model(tmp_path, formats=["exe"])  # type: ignore[list-item]
    assert not (tmp_path / "out").exists()
