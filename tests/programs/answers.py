"""What the library answers, and the same questions as a program's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from tests.conftest import FEATURES, tiny_config, write_cycle
from torchrec_pt.build import build_learner, build_task
from torchrec_pt.config import RunConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import load_entity_features
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.prepare import prepare
from torchrec_pt.distributed import join_ranks
from torchrec_pt.held_out import predict_pairs
from torchrec_pt.learner import Learner
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.programs.encoders import Program
from torchrec_pt.programs.ports import FeatureInputs
from torchrec_pt.scoring import ModelScorer, encode_histories, encode_item_range, head_of
from torchrec_pt.tasks.pairs import PairTask

# Those of the cycle, and a vector of items, a number of theirs and a category of users.
ALL_FEATURES = [
    *FEATURES,
    {"column": "vec", "of": "item", "kind": "vector", "separator": " "},
    {"column": "price", "of": "item", "kind": "numeric"},
    {"column": "town", "of": "user", "kind": "categorical"},
]

Answer = tuple[dict[str, Tensor], Tensor, Tensor]  # inputs by name, expected, which count


def rich_data(folder: Path) -> PreparedDataset:
    """The cycle with every kind of feature of every entity, some of them missing."""
    write_cycle(folder / "log.tsv")
    log = pl.read_csv(folder / "log.tsv", separator="\t")
    item = pl.col("item_id").str.slice(1).cast(pl.Int64)
    user = pl.col("user_id").str.slice(1).cast(pl.Int64)
    is_last = pl.int_range(pl.len()).over("user_id") == pl.len().over("user_id") - 1
    # Two items are in test alone: training does not know them.
    unseen = pl.when(is_last & (user < 2)).then(pl.format("i{}", user + 30))
    log = log.with_columns(item_id=unseen.otherwise(pl.col("item_id")))
    log.with_columns(
        vec=pl.when(item % 5 > 0).then(pl.format("{} {} 0.5", item / 7, 1 - item / 9)),
        price=pl.when(item % 7 > 0).then(item * 100 + 3),
        town=pl.when(user % 4 > 0).then(pl.format("t{}", user % 3)),
    ).write_csv(folder / "log.tsv", separator="\t")
    config = tiny_config(folder, ALL_FEATURES)
    prepare(config.data, folder / "prepared", 0)
    return PreparedDataset.load(folder / "prepared")


def random_learner(config: RunConfig, dataset: PreparedDataset, task: str | None) -> Learner:
    """Every weight away from where it starts, since many start at 0 or 1."""
    objectives = [] if task is None else [build_task(config, task, dataset)]
    built = build_learner(config, TrainConfig(), objectives, dataset, join_ranks())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in built.model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=draw))
    built.model.eval()
    return built.learner


def answers(learner: Learner, dataset: PreparedDataset) -> dict[str, Answer]:
    """Program -> what the library says of every user, item or test interaction."""
    task = next(iter(learner.objectives.values()), None)
    if isinstance(task, PairTask):
        return {task.name: _of_pairs(learner, task, dataset)}
    backbone, ranks, head = learner.backbone, join_ranks(), head_of(learner)
    users, items = torch.arange(dataset.num_users), torch.arange(dataset.num_items)
    history = dataset.history("test")
    given = {"history": padded(history, -1), **user_inputs(dataset, users)}
    given["times"] = padded(history.with_values(history.times_or_nan), torch.nan)
    with torch.no_grad():
        vectors = head.user_vectors(encode_histories(backbone, users, history))
    scorer = ModelScorer(backbone, history, ranks, head)
    scores = scorer.scores(scorer.queries(users), range(dataset.num_items))
    all_items = {"items": items.expand(len(users), -1).contiguous()}
    encoded = encode_item_range(backbone, 0, dataset.num_items)
    return {
        "user_encoder": (given, vectors, torch.tensor(True)),
        "item_encoder": ({"items": items}, encoded, torch.tensor(True)),
        "new_item_encoder": (
            inputs_of(dataset, "item", items),
            encoded,
            # Only what training never saw is known by its features alone.
            (items >= dataset.num_trained_items).unsqueeze(1),
        ),
        "ranking": ({**given, **all_items}, scores, torch.tensor(True)),
    }


def _of_pairs(learner: Learner, task: PairTask, dataset: PreparedDataset) -> Answer:
    asked = task.held_out("test")
    parts = dataset.part_of_user[asked.users]
    found = predict_pairs(learner, task, asked, parts, join_ranks(), 8)
    history = asked.history(1000)  # a program cuts it itself
    told = task.labels[history.values]
    assert dataset.timestamp is not None
    places = asked.targets.with_values(asked.interactions)
    at = torch.where(asked.interactions >= 0, dataset.timestamp[asked.interactions], torch.nan)
    rows = dataset.interactions.values[history.values]
    beside = padded(places, -1)
    given = {
        "history": padded(history.with_values(rows), -1),
        "times": padded(history.with_values(dataset.timestamp[history.values]), torch.nan),
        "labels": padded(history.with_values(told), torch.nan),
        "items": padded(asked.targets, 0),
        "item_times": padded(asked.targets.with_values(at), torch.nan),
        **user_inputs(dataset, asked.users),
    }
    of_pairs = inputs_of(dataset, "interaction", beside.clamp(min=0).flatten())
    for name, values in of_pairs.items():
        # Of a drawn item, which was no interaction, nothing is known.
        given[name] = torch.where((beside >= 0).unsqueeze(2), values.unflatten(0, beside.shape), -1)
    is_pair = padded(asked.targets.with_values(torch.ones_like(asked.targets.values)), 0) > 0
    expected = torch.zeros(is_pair.shape)
    expected[is_pair] = found
    return given, expected, is_pair


def user_inputs(dataset: PreparedDataset, users: Tensor) -> dict[str, Tensor]:
    return inputs_of(dataset, "user", users)


def inputs_of(dataset: PreparedDataset, of: Any, ids: Tensor) -> dict[str, Tensor]:
    """Raw features of users, items or interactions; categories through the library's own ids."""
    cells = FeatureEncoder(load_entity_features(dataset, of), 8).cells()
    tables = {
        "user": dataset.users,
        "item": dataset.items,
        "interaction": dataset.interaction_features,
    }
    given: dict[str, Tensor] = {}
    for port in FeatureInputs(dataset, of).ports("rows"):
        column = tables[of][port.name.partition("_")[2]]
        if port.dtype == torch.int64:
            given[port.name] = cells[port.name][ids]
        elif port.dtype == torch.float64:
            numbers = column.cast(pl.Float64).fill_null(float("nan"))
            given[port.name] = torch.from_numpy(numbers.to_numpy(writable=True))[ids]
        else:
            width = port.shape[-1]
            vectors = [[0.0] * int(width) if cell is None else list(cell) for cell in column]
            given[port.name] = torch.tensor(vectors)[ids]
    return given


def padded(jagged: Jagged, nothing: float) -> Tensor:
    """(R, longest), `nothing` after the end of a row."""
    rows = jagged.values.new_full((jagged.num_rows, int(jagged.lengths.max())), nothing)
    rows[jagged.rows, jagged.positions] = jagged.values
    return rows


def arguments(program: Program, given: dict[str, Tensor]) -> list[Tensor]:
    return [given[port.name] for port in program.inputs]


def worst(got: Tensor, expected: Tensor, counts: Tensor) -> float:
    """The largest difference, beside the size of the answers."""
    difference = torch.where(counts, got - expected, 0.0).abs().max()
    return float((difference / expected.abs().max()).detach())
