"""Times on their way from the data to attention: in training, evaluation, serving, export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from tests.conftest import rows_of, tiny_config
from tests.training.resume import pretrain
from torchrec_pt import Recommender, export_embeddings, pipeline
from torchrec_pt.build import build_backbone, build_learner, build_task
from torchrec_pt.config import RunConfig
from torchrec_pt.data.batch import Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.scoring import ModelScorer
from torchrec_pt.served import load_served
from torchrec_pt.tasks.asked import held_out_pairs
from torchrec_pt.tasks.pairs import PairTask

MODEL = {"dim": 16, "num_layers": 1, "max_length": 8, "positions": "relative_time"}
STEPS = {"epochs": 2, "batch_size": 10, "warmup_steps": 0, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _timed(rows: Rows) -> Rows:
    """Item i was taken at 10 i."""
    items = rows.histories
    return replace(rows, histories=replace(items, times=10.0 * items.values.double()))


@pytest.mark.parametrize(
    ("objective", "attention", "segment"),
    [
        ({"name": "masked_item"}, "bidirectional", "history"),
        ({"name": "next_item"}, "causal", "history"),
        ({"name": "contrastive", "pairs": "user_item"}, "causal", "history"),
        ({"name": "contrastive", "augmentations": ["crop", "mask"]}, "bidirectional", "views"),
        ({"name": "next_segment"}, "causal", "segments"),
        (
            {"name": "denoising", "corruptions": ["delete", "infill"]},
            "bidirectional",
            "corrupted",
        ),
    ],
)
def test_what_pretraining_draws_keeps_its_times(
    cycle: PreparedDataset, objective: dict[str, Any], attention: str, segment: str
) -> None:
    config = tiny_config(
        cycle.path, model={**MODEL, "attention": attention}, pretrain={"objectives": [objective]}
    )
    (built,) = build_objectives(config, cycle)
    drawn = built.draw(_timed(rows_of([12, 0, 3]))).lookups[segment]  # type: ignore[operator]
    assert len(drawn.values)
    assert drawn.times is not None
    assert torch.equal(drawn.times, 10.0 * drawn.values.double())


def test_a_reordered_view_has_the_times_of_its_places(cycle: PreparedDataset) -> None:
    objective = {"name": "contrastive", "augmentations": ["reorder"], "reorder_fraction": 1.0}
    config = tiny_config(cycle.path, model=MODEL, pretrain={"objectives": [objective]})
    (built,) = build_objectives(config, cycle)
    views = built.draw(_timed(rows_of([7] * 10))).lookups["views"]  # type: ignore[operator]
    assert views.times is not None
    assert torch.equal(views.times, 10.0 * (100 * (views.rows % 10) + views.positions))
    assert not torch.equal(views.times, 10.0 * views.values.double())


def test_ranking_keeps_the_times_of_histories(cycle: PreparedDataset) -> None:
    config = tiny_config(cycle.path, model=MODEL, finetune={"ranking": {}})
    task = build_task(config, "ranking", cycle)
    history = task.draw(_timed(rows_of([12, 0, 3]))).lookups["history"]
    assert history.times is not None
    assert torch.equal(history.times, 10.0 * history.values.double())


@pytest.mark.parametrize("task", ["ctr", "rating"])
def test_pairs_keep_the_times_of_histories(cycle: PreparedDataset, ranks: Ranks, task: str) -> None:
    raw = {"positive_rating": 3} if task == "ctr" else {}
    config = tiny_config(cycle.path, model=MODEL, finetune={task: raw})
    built = build_task(config, task, cycle)
    assert isinstance(built, PairTask)
    loader = HistoryLoader(cycle, batch_size=10, max_length=8, seed=0, ranks=ranks)
    asked = held_out_pairs(cycle, "test")
    assert cycle.timestamp is not None
    history = built.draw(next(loader.steps(0))).lookups["history"]
    assert history.times is not None
    # The circle's clock counts a user's interactions.
    start = history.times[history.offsets[history.rows]]
    assert torch.equal(history.times - start, history.positions.double())
    expected = cycle.timestamp[asked.history(7).values]
    assert torch.equal(built.draw_asked(asked).lookups["history"].times_or_nan, expected)


@pytest.mark.parametrize("positions", ["learned", "rotary", "relative_time"])
def test_times_stand_in_a_batch_where_the_backbone_reads_them(
    cycle: PreparedDataset, ranks: Ranks, positions: str
) -> None:
    config = tiny_config(cycle.path, model={**MODEL, "positions": positions})
    assert config.pretrain is not None
    objectives = build_objectives(config, cycle)
    learner = build_learner(config, config.pretrain, objectives, cycle, ranks).learner
    loader = HistoryLoader(cycle, batch_size=10, max_length=8, seed=0, ranks=ranks)
    times = learner.draw(next(loader.steps(0))).times
    assert set(times) == ({"masked_item.history"} if positions == "relative_time" else set())


def test_data_without_times_is_refused_by_one_line(cycle: PreparedDataset) -> None:
    config = tiny_config(cycle.path, model=MODEL)
    without = replace(cycle, timestamp=None)
    with pytest.raises(ValueError, match="timestamp is not set; set it, or use") as caught:
        build_backbone(config.model, without)
    assert "\n" not in str(caught.value)
    build_backbone(config.model.model_copy(update={"positions": "rotary"}), without)


# --- a whole run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(cycle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(
        cycle_folder,
        model=MODEL,
        pretrain={**STEPS, "epochs": 10, "objectives": [{"name": "masked_item"}]},
        finetune={"ranking": STEPS, "rating": STEPS},
    ).model_copy(update={"run_dir": tmp_path_factory.mktemp("timed")})
    pipeline.run(config)
    return config


@pytest.fixture(scope="module")
def served(finished: RunConfig, ranks: Ranks) -> tuple[PreparedDataset, Backbone]:
    found = load_served(finished.run_dir, ranks)
    return found.dataset, found.learner.backbone


def test_evaluation_and_serving_read_the_times(
    served: tuple[PreparedDataset, Backbone], ranks: Ranks
) -> None:
    dataset, backbone = served
    history, users = dataset.history("test"), torch.arange(dataset.num_users)
    with_times = ModelScorer(backbone, history, ranks).queries(users)
    without = ModelScorer(backbone, Jagged(history.values, history.offsets), ranks).queries(users)
    assert (with_times != without).any(1).all()


def test_a_history_without_times_is_enough_for_a_recommendation(finished: RunConfig) -> None:
    recommender = Recommender.load(finished.run_dir)
    found = recommender.recommend(history=["i1", "i2", "i3"], k=5)
    assert len(found) == 5
    assert len(recommender.recommend(recommender.first_user, k=5)) == 5


def test_exported_users_are_those_that_the_recommender_asks_with(
    finished: RunConfig, tmp_path: Path
) -> None:
    paths = [export_embeddings(finished.run_dir, what, out=tmp_path) for what in ("users", "items")]
    users, items = map(pl.read_parquet, paths)
    scores = (
        torch.tensor(users["embedding"][4].to_list())
        @ torch.tensor(items["embedding"].to_list()).T.contiguous()
    )
    expected = items["id"][scores.topk(7).indices.tolist()].to_list()
    found = Recommender.load(finished.run_dir).recommend(users["id"][4], k=7, exclude_seen=False)
    assert [one.item for one in found] == expected


def test_a_resumed_run_is_as_one_that_was_never_broken_off(
    cycle_folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    def run(folder: str, dies_at: int | None) -> dict[str, Any]:
        settings = {**STEPS, "checkpoint_every": 3, "objectives": [{"name": "masked_item"}]}
        config = tiny_config(cycle_folder, model=MODEL, pretrain=settings)
        config = config.model_copy(update={"run_dir": tmp_path / folder})
        pipeline.prepare(config)
        case = {"config": config.model_dump(mode="json"), "goes_on_from": None}
        return pretrain({**case, "dies_at": dies_at}, ranks)

    whole = run("whole", None)
    run("broken off", 7)
    rest = run("broken off", None)
    assert [step for step, _ in rest["losses"]] == [6, 7]
    assert rest["losses"] == whole["losses"][6:]
    assert rest["result"]["metrics"] == whole["result"]["metrics"]
