"""ctr and rating: who is asked what, the head written out, labels, and that they learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import FEATURES, embedded, tiny_config
from tests.training import losses
from torchrec_pt.build import build_backbone, build_task
from torchrec_pt.config import CtrConfig, RunConfig
from torchrec_pt.data.batch import Rows, rows_of_users
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.held_out import predict_pairs
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.positions import NUM_TIME_BUCKETS, TIME_BUCKET_WIDTH
from torchrec_pt.rng import RowNoise
from torchrec_pt.tasks import asked as asking
from torchrec_pt.tasks.asked import Asked, held_out_pairs
from torchrec_pt.tasks.ctr import click_labels
from torchrec_pt.tasks.pairs import PairTask, _cumsum_in_rows

DIM = 16
MODELS: dict[str, dict[str, Any]] = {
    "causal": {"num_layers": 1, "attention": "causal"},
    "bidirectional": {"num_layers": 1},
    "two_tower": {"backbone": "two_tower", "hidden_dims": [8]},
    "autoencoder": {"backbone": "autoencoder", "hidden_dims": [8]},
}
TASKS: dict[str, dict[str, Any]] = {"ctr": {"positive_rating": 3}, "rating": {}}
EVERY_TASK = pytest.mark.parametrize("name", list(TASKS))


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def pair_config(name: str, model: str = "bidirectional", **task: Any) -> RunConfig:
    return tiny_config(
        Path(),
        model={"dim": DIM, "max_length": 5, "dropout": 0.0, **MODELS[model]},
        finetune={name: {"hidden_dims": [8], "dropout": 0.0, **TASKS[name], **task}},
    )


def built(config: RunConfig, data: PreparedDataset) -> tuple[PairTask, Backbone]:
    task = build_task(config, next(iter(config.finetune.tasks)), data)
    assert isinstance(task, PairTask)
    backbone = build_backbone(config.model, data)
    backbone.items.collection.to_empty(device=torch.device("cpu"))
    torch.nn.init.normal_(backbone.items.weight)
    return task, backbone


def rows_of_ids(data: PreparedDataset, users: list[int], step: int = 0) -> Rows:
    ids = torch.tensor(users)
    return Rows(
        users=ids,
        noise=RowNoise(0, step, torch.arange(len(ids))),
        weight=(ids >= 0).float(),
        histories=rows_of_users(data.history("train"), ids),
    )


def _interactions(asked: Asked) -> Jagged:
    """R rows of the interactions that are asked."""
    return asked.targets.with_values(asked.interactions)


def parts_of(jagged: Jagged) -> list[list[int]]:
    return [part.tolist() for part in jagged.values.split(jagged.lengths.tolist())]


# --- who is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["cycle", "scattered"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_held_out_row_is_asked_once_with_what_was_known_before_it(
    request: pytest.FixtureRequest, data: str, split: Any
) -> None:
    dataset: PreparedDataset = request.getfixturevalue(data)
    code = {"valid": 1, "test": 2}[split]
    asked = held_out_pairs(dataset, split)
    user_of = dataset.interactions.rows.tolist()
    splits = dataset.split.tolist()
    seen = []
    for user, history, targets in zip(
        asked.users.tolist(),
        parts_of(asked.history(999)),
        parts_of(_interactions(asked)),
        strict=True,
    ):
        for row in targets:
            known = [r for r in range(row) if user_of[r] == user and splits[r] < code]
            assert history == known
            assert user_of[row] == user
        seen += targets
    assert seen == [row for row, found in enumerate(splits) if found == code]
    assert len(seen) > 30


@EVERY_TASK
def test_training_asks_training_rows_right_after_their_history(
    scattered: PreparedDataset, name: str
) -> None:
    task, _ = built(pair_config(name, cuts_per_user=2, targets_per_cut=3), scattered)
    trained = parts_of(
        scattered.interactions.with_values(torch.arange(len(scattered.split))).filter(
            scattered.split == 0
        )
    )
    items = scattered.interactions.values
    asked_rows: set[int] = set()
    for step in range(60):
        draw = task.draw(rows_of_ids(scattered, [3, -1, 0], step))
        targets = parts_of(draw.lookups["target"].with_values(draw.tensors["interaction"]))
        histories = parts_of(draw.lookups["history"])
        for user, target, history in zip([3, -1, 0] * 2, targets, histories, strict=True):
            if user < 0:
                assert target == history == []
                continue
            cut = trained[user].index(target[0])
            assert target == trained[user][cut : cut + 3]
            assert history == items[trained[user][max(0, cut - 4) : cut]].tolist()
            if user == 3:
                asked_rows |= set(target)
        assert torch.equal(draw.lookups["target"].values, items[draw.tensors["interaction"]])
        assert torch.equal(draw.tensors["label"], task.labels[draw.tensors["interaction"]])
    assert asked_rows == set(trained[3])


@EVERY_TASK
@pytest.mark.parametrize(("context", "most"), [("before", 3), ("before", 99), ("others", 3)])
def test_a_pair_counts_alike_in_a_batch_of_short_histories_and_of_long_ones(
    scattered: PreparedDataset, name: str, context: str, most: int
) -> None:
    config = pair_config(name, context=context, targets_per_cut=most, cuts_per_user=2)
    task, backbone = built(config, scattered)
    lengths = scattered.history("train").lengths
    by_length = lengths.argsort()[(lengths == 0).sum() :].tolist()

    def weight(users: list[int]) -> float:
        rows = rows_of_ids(scattered, users)
        drawn = embedded(task.draw(rows), backbone.items.weight)
        return float(task.loss(backbone, drawn, rows, None).weight)

    assert weight([*by_length[:4], -1]) == weight(by_length[-4:])
    num_steps = 1 if context == "others" else 300  # of which the lots of cuts take the mean
    asked = [
        len(task.draw(rows_of_ids(scattered, by_length, step)).tensors["label"])
        for step in range(num_steps)
    ]
    tolerance = 1e-5 if context == "others" else 0.02
    assert weight(by_length) == pytest.approx(sum(asked) / num_steps, rel=tolerance)


def test_drawn_negatives_count_as_pairs(cycle: PreparedDataset) -> None:
    task, backbone = built(
        pair_config("ctr", positive_rating=None, negatives={"num": 3}, context="others"), cycle
    )
    rows = rows_of_ids(cycle, list(range(cycle.num_users)))
    drawn = embedded(task.draw(rows), backbone.items.weight)
    term = task.loss(backbone, drawn, rows, None)
    assert float(term.weight) == pytest.approx(len(drawn.tensors["label"]), rel=1e-5)


# --- the head -----------------------------------------------------------------------------------


def _perturbed(task: PairTask) -> None:
    """So that every part of the formula is seen in the result."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@EVERY_TASK
@pytest.mark.parametrize("model", list(MODELS))
def test_predictions_are_the_formula_written_out(
    scattered: PreparedDataset, name: str, model: str
) -> None:
    task, backbone = built(pair_config(name, model), scattered)
    _perturbed(task)
    asked = held_out_pairs(scattered, "test").select(torch.arange(12))
    drawn = embedded(task.draw_asked(asked), backbone.items.weight)
    with torch.no_grad():
        got = task.predict(backbone, drawn, asked.users)
        expected = [
            _written_out(task, backbone, scattered, user, history, row)
            for user, history, rows in zip(
                asked.users.tolist(),
                parts_of(asked.history(999)),
                parts_of(_interactions(asked)),
                strict=True,
            )
            for row in rows
        ]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert min(len(history) for history in parts_of(asked.history(999))) < 3


def _written_out(
    task: PairTask,
    backbone: Backbone,
    data: PreparedDataset,
    user: int,
    history: list[int],
    row: int,
) -> float:
    """One pair, as the docstring of pair_head has it."""
    history = history[-backbone.history_length :]
    items = data.interactions.values
    ids, target = items[torch.tensor(history, dtype=torch.int64)], items[row : row + 1]
    table, head, attention = backbone.items.weight, task.head, task.head.attention
    information = 4 * task.mean * (1 - task.mean) if task.name == "ctr" else 1.0
    bias = _closed_biases(task, data) + task.item_bias.weight.squeeze(1)
    one = torch.tensor([user])
    user_vector = backbone.encode_users(one, Jagged(table[ids], torch.tensor([0, len(ids)])))[0]
    item_vector = backbone.encode_items(target, table[target])[0]
    memory = backbone.encode_items(ids, table[ids])
    residual = task.labels[torch.tensor(history, dtype=torch.int64)] - task.mean - bias[ids]
    mean = residual.sum() / (len(history) + 10 / information)
    residual = residual - mean

    def likeness(x: Tensor) -> Tensor:
        return attention.likeness(attention.norm(x))

    shares = []
    for head_number, part in enumerate(torch.arange(DIM).split(DIM // attention.num_heads)):
        logits = likeness(memory)[:, part] @ likeness(item_vector)[part] / math.sqrt(len(part))
        logits = logits * math.sqrt(attention.num_heads)
        logits = logits + attention.elapsed[head_number][_buckets(data, history, row)]
        shares.append(torch.cat([attention.null[head_number : head_number + 1], logits]).softmax(0))
    attended = torch.cat(
        [
            share[1:] @ attention.value(memory)[:, part]
            for share, part in zip(
                shares, torch.arange(DIM).split(DIM // attention.num_heads), strict=True
            )
        ]
    )
    echoes = torch.stack([mean, *(share[1:] @ residual for share in shares)])
    fields = [
        task.features["user"](one),
        task.features["item"](target),
        task.features["interaction"](torch.tensor([row])),
    ]
    assert sum(field.shape[1] for field in fields) == len(FEATURES)
    factors = head.factors
    told = (residual.unsqueeze(1) * factors.said(memory) + factors.taken(memory)).sum(0)
    p_u = told / math.sqrt(len(history) + 1) + fields[0][0].sum(0)
    t_ui = p_u @ (factors.asked(item_vector) + fields[1][0].sum(0))
    x = torch.cat(
        [
            user_vector,
            item_vector,
            attended,
            torch.cat(fields, dim=1).flatten(),
            user_vector * item_vector,
            echoes,
            t_ui.unsqueeze(0),
        ]
    )
    hidden = F.gelu(head.hidden[0](x))
    deviation = bias[target[0]] + echoes @ head.echo_weight + information * t_ui
    learned = head.out(hidden)[0]
    if task.name == "rating":
        return float((task.mean + deviation + learned).clamp(1, 5))
    logit = math.log(task.mean / (1 - task.mean)) + deviation / (task.mean * (1 - task.mean))
    return float(torch.sigmoid(logit + learned))


@EVERY_TASK
def test_a_label_that_is_asked_does_not_reach_its_own_prediction(
    scattered: PreparedDataset, name: str
) -> None:
    task, backbone = built(pair_config(name), scattered)
    _perturbed(task)
    asked = held_out_pairs(scattered, "test")
    before = task.predict(
        backbone, embedded(task.draw_asked(asked), backbone.items.weight), asked.users
    )
    task.labels = torch.where(scattered.split == 2, 99.0, task.labels)
    after = task.predict(
        backbone, embedded(task.draw_asked(asked), backbone.items.weight), asked.users
    )
    assert torch.equal(before, after)


def _buckets(data: PreparedDataset, history: list[int], row: int) -> list[int]:
    """Of the time from each row of the history to `row`; a later one's are of another kind."""
    assert data.timestamp is not None
    between = [float(data.timestamp[row] - data.timestamp[other]) for other in history]
    found = [int(math.log(max(1, abs(t))) / TIME_BUCKET_WIDTH) for t in between]
    return [b if t >= 0 else NUM_TIME_BUCKETS + 1 + b for b, t in zip(found, between, strict=True)]


def _closed_biases(task: PairTask, data: PreparedDataset) -> Tensor:
    """Shrunk mean deviations of the training labels, item by item."""
    biases = torch.zeros(data.num_items)
    train = data.split == 0
    for item in range(data.num_items):
        labels = task.labels[train & (data.interactions.values == item)]
        biases[item] = (labels - task.mean).sum() / (len(labels) + task.shrinkage)
    return biases


@EVERY_TASK
def test_an_asked_training_label_is_not_in_its_own_bias(
    scattered: PreparedDataset, name: str
) -> None:
    task, _ = built(pair_config(name), scattered)
    items, train = scattered.interactions.values, scattered.split == 0
    row = int(torch.nonzero(train)[7])
    others = train.clone()
    others[row] = False
    labels = task.labels[others & (items == items[row])]
    expected = (labels - task.mean).sum() / (len(labels) + task.shrinkage)
    got = task.item_biases(items[row : row + 1], task.labels[row : row + 1])
    torch.testing.assert_close(got[0], expected)
    assert len(labels) > 0


@EVERY_TASK
def test_the_biases_alone_are_mean_item_and_user(scattered: PreparedDataset, name: str) -> None:
    task, _ = built(pair_config(name), scattered)
    asked = held_out_pairs(scattered, "test").select(torch.arange(20))
    got = task.predict_by_biases(asked).tolist()
    items, labels = scattered.interactions.values.tolist(), task.labels.tolist()
    bias = _closed_biases(task, scattered).tolist()
    expected = []
    for history, rows in zip(
        parts_of(asked.history(999)), parts_of(_interactions(asked)), strict=True
    ):
        user = sum(labels[r] - task.mean - bias[items[r]] for r in history) / (
            len(history) + task.shrinkage
        )
        for row in rows:
            deviation = bias[items[row]] + user
            value = task.mean + deviation
            if name == "ctr":
                odds = task.mean / (1 - task.mean)
                odds *= math.exp(deviation / (task.mean * (1 - task.mean)))
                value = odds / (1 + odds)
            expected.append(value)
    assert got == pytest.approx(expected, rel=1e-4)


def test_rare_clicks_start_no_worse_than_their_rate(cycle: PreparedDataset) -> None:
    """One click among a hundred impressions must not be echoed as certainty."""
    generator = torch.Generator().manual_seed(3)
    clicks = (torch.rand(len(cycle.split), generator=generator) < 0.03).float()
    rare = dataclasses.replace(cycle, label=clicks)
    config = tiny_config(
        Path(), model={"dim": DIM, "max_length": 5, "num_layers": 1}, finetune={"ctr": {}}
    )
    task, backbone = built(config, rare)
    asked = held_out_pairs(rare, "test")
    labels = clicks[asked.interactions]
    constant = F.binary_cross_entropy(torch.full_like(labels, task.mean), labels)
    drawn = embedded(task.draw_asked(asked), backbone.items.weight)
    with torch.no_grad():
        start = task.predict(backbone, drawn, asked.users)
    for predictions in (start, task.predict_by_biases(asked)):
        assert F.binary_cross_entropy(predictions, labels) < 1.1 * constant


def test_many_targets_of_one_history_are_asked_in_pieces(
    cycle: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = dataclasses.replace(cycle, split=torch.where(cycle.split == 0, cycle.split, 2))
    late.split[cycle.interactions.positions > 1] = 2
    whole = held_out_pairs(late, "test")
    monkeypatch.setattr(asking, "MOST_TARGETS", 3)
    cut = held_out_pairs(late, "test")
    assert int(whole.targets.lengths.max()) > 3
    assert int(cut.targets.lengths.max()) == 3
    assert torch.equal(cut.targets.values, whole.targets.values)
    for field in ("users", "num_known"):
        one, other = (getattr(a, field)[a.targets.rows] for a in (whole, cut))
        assert torch.equal(one, other)


# --- labels -------------------------------------------------------------------------------------


def test_clicks_are_labels_or_ratings_from_the_threshold_on(cycle: PreparedDataset) -> None:
    assert cycle.rating is not None
    clicks = click_labels(CtrConfig(positive_rating=4), cycle)
    assert torch.equal(clicks, (cycle.rating >= 4).float())
    given = dataclasses.replace(cycle, label=clicks)
    assert torch.equal(click_labels(CtrConfig(), given), clicks)


@pytest.mark.parametrize(
    ("changes", "positive_rating", "message"),
    [
        ({}, None, r"needs labels; set data\.columns\.label, or positive_rating"),
        ({"rating": None}, 4.0, r"data\.columns\.rating is not set"),
        ({"label": 2.0}, None, "labels must be 0 or 1, found 2"),
        ({"label": 1.0}, None, "every training label is 1"),
        ({}, 0.5, "every training label is 1"),
        ({}, 6.0, "every training label is 0"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(
    cycle: PreparedDataset, changes: dict[str, Any], positive_rating: float | None, message: str
) -> None:
    if isinstance(changes.get("label"), float):
        changes = {"label": torch.full_like(cycle.split, changes["label"], dtype=torch.float32)}
    with pytest.raises(ValueError, match=message) as caught:
        click_labels(
            CtrConfig(positive_rating=positive_rating), dataclasses.replace(cycle, **changes)
        )
    assert "\n" not in str(caught.value)


def test_rating_without_ratings_is_refused(cycle: PreparedDataset) -> None:
    with pytest.raises(ValueError, match=r"data\.columns\.rating is not set"):
        build_task(pair_config("rating"), "rating", dataclasses.replace(cycle, rating=None))


# --- learning -----------------------------------------------------------------------------------


@EVERY_TASK
@pytest.mark.parametrize("model", list(MODELS))
def test_it_lowers_its_own_loss(
    cycle_with_features: PreparedDataset,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    model: str,
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 25)  # of four steps
    task = {"batch_size": 10, "learning_rate": 0.01, "warmup_steps": 0, "cuts_per_user": 2}
    config = pair_config(name, model, **task)
    found = losses.train({"config": config.model_dump(mode="json")}, cycle_with_features, ranks)[
        "losses"
    ]
    means = torch.tensor(found).view(25, 4).mean(1)
    # The labels are chance, so this is learned by heart.
    assert means[-2:].mean() < 0.9 * means[:2].mean(), means


def test_blocks_of_any_size_predict_the_same(scattered: PreparedDataset, ranks: Ranks) -> None:
    task, backbone = built(pair_config("rating"), scattered)
    _perturbed(task)

    @dataclasses.dataclass
    class Holder:
        backbone: Backbone

    asked = held_out_pairs(scattered, "test")
    parts = scattered.part_of_user[asked.users]
    whole, cut = (
        predict_pairs(Holder(backbone), task, asked, parts, ranks, size)  # type: ignore[arg-type]
        for size in (1000, 7)
    )
    torch.testing.assert_close(cut, whole)
    assert len(whole) == int((scattered.split == 2).sum())


def test_running_sums_of_a_row_have_the_same_bits_whatever_rows_stand_before() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(0, 40, (500,))
    values = torch.randn(int(lengths.sum()), dtype=torch.float64)
    rows = Jagged.from_lengths(values, lengths)
    sums = rows.with_values(_cumsum_in_rows(rows, values))
    expected = [row.cumsum(0) for row in values.split(lengths.tolist())]
    torch.testing.assert_close(sums.values, torch.cat(expected))
    late = torch.arange(250, 500)
    alone = rows.select(late)
    assert torch.equal(_cumsum_in_rows(alone, alone.values), sums.select(late).values)
