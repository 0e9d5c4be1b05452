"""Several batches make one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_config
from tests.training.both_ways import recorded, tensor_hashes, train_case
from torchrec_pt.build import build_learner, build_task
from torchrec_pt.config import RunConfig
from torchrec_pt.data.batch import Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.optim import Optimizers, schedule_factor
from torchrec_pt.rng import RowNoise
from torchrec_pt.train import Trainer, TrainingError
from torchrec_pt.train_pipeline import TakenStep
from torchrec_pt.transfer import Numbering

# 37 users in batches of 5: 8 an epoch, of which the last step takes 2.
SETTINGS = {"batch_size": 5, "accumulate_steps": 3, "epochs": 2, "learning_rate": 0.01}
SCHEDULE = {"warmup_steps": 2, "schedule": "linear", "average_decay": 0.6}
STEPS_PER_EPOCH, NUM_BATCHES = 3, 16
MODEL = {"dim": 16, "num_layers": 1, "max_length": 8, "dropout": 0.2}
SOFTMAX = {"finetune": {"ranking": {**SETTINGS, "loss": "softmax"}}}
PAIRS = {"name": "contrastive", "pairs": "user_item", "weight": 0.5}
SEVERAL = {"pretrain": {**SETTINGS, "objectives": [{"name": "masked_item"}, PAIRS]}}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _trainer(config: RunConfig, dataset: PreparedDataset, ranks: Ranks) -> Trainer:
    if config.finetune.ranking is not None:
        train, objectives = config.finetune.ranking, [build_task(config, "ranking", dataset)]
    else:
        assert config.pretrain is not None
        train, objectives = config.pretrain, build_objectives(config, dataset)
    built = build_learner(config, train, objectives, dataset, ranks)
    loader = HistoryLoader(dataset, batch_size=16, max_length=8, seed=0, ranks=ranks)
    return Trainer(
        built.model,
        built.learner,
        Optimizers(built.model, train, built.placement, 100),
        loader,
        train,
        name="stage",
        monitor="ndcg@10",
        folder=config.run_dir,
        fingerprint="",
        numbering=Numbering.of(dataset),
        ranks=ranks,
        console=None,
    )


def _part(rows: Rows, part: slice) -> Rows:
    return replace(
        rows,
        users=rows.users[part],
        weight=rows.weight[part],
        noise=RowNoise(rows.noise.seed, rows.noise.step, rows.noise.rows[part]),
        histories=rows.histories.select(torch.arange(rows.num_rows)[part]),
    )


def _halves(trainer: Trainer) -> tuple[Rows, Rows, Rows]:
    """A batch of 16 rows, and the same as two of 8."""
    whole = next(trainer.loader.steps(0))
    return whole, _part(whole, slice(0, 8)), _part(whole, slice(8, 16))


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in trainer.learner.named_parameters() if p.grad is not None}


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Float32 sums in another order; a gradient that cancels is as good as the largest one."""
    assert got.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6 * largest, msg=name)


def test_two_batches_are_one_of_all_their_rows_where_each_counts_as_much(
    cycle: PreparedDataset, tmp_path: Path, ranks: Ranks
) -> None:
    table = {"placement": "replicated", "optimizer": "sgd", "learning_rate": 0.5}
    towers = {"backbone": "two_tower", "dim": 16, "max_length": 8, "hidden_dims": [8]}
    config = tiny_config(tmp_path, model={**towers, "item_table": table}, **SOFTMAX)
    one, two = (_trainer(config, cycle, ranks) for _ in range(2))
    before = {n: p.detach().clone() for n, p in two.learner.named_parameters()}
    whole, *halves = _halves(one)
    expected, taken = one.step(whole), two.step(*halves)
    assert taken.num_rows == expected.num_rows == 16
    torch.testing.assert_close(taken.means, expected.means)
    _assert_close(_gradients(two), _gradients(one))
    for name, parameter in two.learner.named_parameters():
        assert not parameter.equal(before[name]), name
        if name.endswith("item.weight"):  # AdamW, of the others, makes much of rounding
            change = parameter - before[name]
            other = one.learner.get_parameter(name) - before[name]
            torch.testing.assert_close(change, other, rtol=1e-4, atol=1e-6)


def test_a_step_goes_by_the_mean_of_the_means_of_its_batches(
    cycle: PreparedDataset, tmp_path: Path, ranks: Ranks
) -> None:
    """Of each objective, whatever they count: masked items and pairs, negatives of the batch."""
    config = tiny_config(tmp_path, model=MODEL, **SEVERAL)
    one, two = (_trainer(config, cycle, ranks) for _ in range(2))
    whole, *halves = _halves(one)
    losses = [one.model(one.learner.draw(half)) for half in halves]
    ((losses[0].loss + losses[1].loss) / 2).backward()
    taken = two.step(*halves)
    torch.testing.assert_close(taken.means, (losses[0].means + losses[1].means) / 2)
    expected = _gradients(one)
    _assert_close(_gradients(two), expected)
    one.step(whole)
    with pytest.raises(AssertionError):  # else the test above would show nothing
        _assert_close(_gradients(one), expected)


@pytest.mark.parametrize("sections", [SEVERAL, SOFTMAX], ids=["several", "softmax"])
def test_a_stage_killed_within_a_step_ends_as_the_uninterrupted_one(
    cycle: PreparedDataset,
    cycle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: Ranks,
    sections: dict[str, Any],
) -> None:
    def case(name: str) -> dict[str, Any]:
        config = tiny_config(cycle_folder, model=MODEL, **sections).model_dump(mode="json")
        stage = config["finetune"]["ranking"] or config["pretrain"]
        if sections is SOFTMAX:
            config["pretrain"] = None
        stage |= {**SCHEDULE, "checkpoint_every": 2}
        return {**config, "run_dir": str(tmp_path / name)}

    with recorded() as steps:
        expected = train_case(case("a"), cycle, ranks)
    assert [entry["step"] for entry in expected.values["curve"]] == [0, 3, 6]
    assert [step["step"] for step in steps] == list(range(NUM_BATCHES))  # noise of its own each
    assert [step["done"] for step in steps] == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5]

    forward = Trainer._forward

    def dies(self: Trainer, batch: Any) -> tuple[Tensor, TakenStep]:
        if batch.step == 12:  # the second of the fifth step
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(Trainer, "_forward", dies)
    with pytest.raises(KeyboardInterrupt):
        train_case(case("b"), cycle, ranks)
    monkeypatch.undo()
    with recorded() as steps:
        resumed = train_case(case("b"), cycle, ranks)
    assert [step["step"] for step in steps] == list(range(11, NUM_BATCHES))
    assert resumed.values["curve"] == expected.values["curve"]
    assert tensor_hashes(resumed.folder) == tensor_hashes(expected.folder)


def test_the_learning_rate_goes_by_steps(
    cycle: PreparedDataset, cycle_folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    settings = {**SEVERAL["pretrain"], **SCHEDULE}
    config = tiny_config(cycle_folder, model=MODEL, pretrain=settings, run_dir=tmp_path)
    with recorded() as steps:
        train_case(config.model_dump(mode="json"), cycle, ranks)
    assert config.pretrain is not None
    for step in steps:
        factor = schedule_factor(config.pretrain, step["done"], 2 * STEPS_PER_EPOCH)
        assert step["rates"] == pytest.approx([0.01 * factor] * len(step["rates"]))


def test_a_loss_that_is_not_finite_in_a_later_batch_updates_nothing(
    cycle: PreparedDataset, tmp_path: Path, ranks: Ranks
) -> None:
    trainer = _trainer(tiny_config(tmp_path, model=MODEL, **SEVERAL), cycle, ranks)
    before = {n: p.detach().clone() for n, p in trainer.learner.named_parameters()}
    _, first, second = _halves(trainer)
    weight = torch.full_like(second.weight, torch.nan)
    with pytest.raises(TrainingError, match="not finite at step 0 "):
        trainer.step(first, replace(second, weight=weight))
    for name, parameter in trainer.learner.named_parameters():
        assert parameter.equal(before[name]), name


def test_a_sharded_table_is_refused(cycle: PreparedDataset, tmp_path: Path, ranks: Ranks) -> None:
    table = {"placement": "row_wise", "optimizer": "adagrad"}
    config = tiny_config(tmp_path, model={**MODEL, "item_table": table}, **SEVERAL)
    with pytest.raises(ValueError, match=r"^accumulate_steps: a sharded .*; drop accumulate_steps"):
        _trainer(config, cycle, ranks)
