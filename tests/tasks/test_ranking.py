"""Fine-tuning for ranking: cuts and targets, negatives, relevance, heads, and that losses learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import FEATURES, embedded, rows_of, tiny_config
from tests.tasks.test_pairs import parts_of, rows_of_ids
from tests.training import losses
from torchrec_pt.config import DataConfig, RankingConfig, TransformerConfig
from torchrec_pt.data.batch import Embedded, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.prepare import prepare
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.models import ranking_head
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.ranking_head import LinearHead, MlpHead, build_head
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.rng import RowNoise
from torchrec_pt.tasks.labels import labelled
from torchrec_pt.tasks.ranking import RankingTask
from torchrec_pt.tasks.relevance import Relevance, load_relevance

NUM_ITEMS = 600


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _model(attention: str = "bidirectional") -> TransformerConfig:
    return TransformerConfig(dim=16, num_layers=1, max_length=5, dropout=0, attention=attention)


def _task(
    attention: str = "bidirectional",
    num_items: int = NUM_ITEMS,
    relevance: Relevance | None = None,
    **settings: Any,
) -> RankingTask:
    counts = torch.arange(num_items, 0, -1)
    config = RankingConfig.model_validate(settings)
    return RankingTask(config, _model(attention), counts, seed=0, relevance=relevance)


def _uniform(num: int) -> dict[str, Any]:
    return {"num": num, "distribution": "uniform"}


@pytest.mark.parametrize(("attention", "num_read"), [("causal", 5), ("bidirectional", 4)])
def test_the_target_follows_the_history_and_every_cut_is_drawn(
    attention: str, num_read: int
) -> None:
    task = _task(attention, targets_per_user=2)
    cuts = []
    for step in range(100):
        draw = task.draw(rows_of([12, 1, 2, 0], step))
        history, target = draw.lookups["history"], draw.tensors["target"]
        assert draw.tensors["row"].tolist() == [0, 2, 4, 6]
        assert draw.tensors["weight"].tolist() == [1] * 4
        parts = history.values.split(history.lengths.tolist())
        for row, item in zip((0, 2, 4, 6), target.tolist(), strict=True):
            assert parts[row].tolist() == list(range(item - min(item % 100, num_read), item))
            assert item // 100 == row % 4
        assert history.lengths[[1, 3, 5, 7]].tolist() == [0] * 4
        cuts += target[[0, 2]].tolist()
    counts = torch.bincount(torch.tensor(cuts), minlength=12)
    assert counts[0] == 0  # the first item has no history
    assert counts[1:].min() >= 3  # 200 draws over 11 places, 18 each on average


def test_only_the_newest_items_are_targets_where_that_is_asked() -> None:
    seen = set()
    for step in range(60):
        draw = _task(newest=3, targets_per_cut=2).draw(rows_of([12, 2, 1], step))
        target, row = draw.tensors["target"], draw.tensors["row"]
        seen |= set(target[row == 0].tolist())
        assert target[row == 1].tolist() == [101]
        assert not (row == 2).any()
    assert seen == {9, 10, 11}


def test_the_targets_of_a_user_are_drawn_apart() -> None:
    target = _task(targets_per_user=2).draw(rows_of([80] * 6)).tensors["target"]
    assert (target[:6] != target[6:]).sum() >= 5
    again = _task(targets_per_user=2).draw(rows_of([80] * 6, step=1)).tensors["target"]
    assert (target != again).sum() >= 10


def test_a_padding_row_weighs_nothing() -> None:
    rows = rows_of([4, 5])
    padded = dataclasses.replace(rows, weight=torch.tensor([1.0, 0.0]))
    for settings in ({}, {"loss": "bpr"}):
        assert _task(**settings).draw(padded).tensors["weight"].tolist() == [1, 0]


@pytest.mark.parametrize("loss", ["softmax", "bpr"])
def test_the_next_items_after_a_cut_are_targets_of_one_list(loss: str) -> None:
    task = _task(loss=loss, targets_per_cut=3)
    for step in range(20):
        draw = task.draw(rows_of([12, 2], step))
        history = draw.lookups["history"]
        if loss == "softmax":
            target = draw.tensors["target"].tolist()
            shares = draw.tensors["weight"]
            assert shares[:-1].sum() == pytest.approx(1)
        else:
            target = draw.lookups["target"].values.tolist()
            assert draw.tensors["weight"].tolist() == [1, 1]
        *of_first, of_second = target
        assert of_first == list(range(of_first[0], min(of_first[0] + 3, 12)))
        assert history.values[history.offsets[1] - 1] == of_first[0] - 1
        assert of_second == 101


def test_an_item_taken_twice_is_one_target_of_a_list() -> None:
    rows = rows_of([5])
    rows = dataclasses.replace(
        rows, histories=Jagged(torch.tensor([7, 8, 9, 8, 8]), rows.histories.offsets)
    )
    task = _task(targets_per_cut=4)
    draws = [
        task.draw(dataclasses.replace(rows, noise=RowNoise(0, step, torch.arange(1)))).tensors
        for step in range(40)
    ]
    targets = {tuple(draw["target"].tolist()) for draw in draws}
    assert targets == {(8, 9), (9, 8), (8,)}
    for draw in draws:
        assert draw["weight"].tolist() == [1 / len(draw["weight"])] * len(draw["weight"])


def test_negatives_are_items_that_the_user_never_took_in_training() -> None:
    rows = rows_of([12, 0, 2, 7])
    task = _task(loss="bpr", num_items=310, negatives=_uniform(300), targets_per_user=2)
    negatives = task.draw(rows).lookups["negatives"].values.view(8, 300)
    taken = [set(part.tolist()) for part in rows.histories.values.split([12, 0, 2, 7])] * 2
    for row in range(8):
        assert not taken[row] & set(negatives[row].tolist())
    counts = torch.histc(negatives[[1, 5]].float(), 10, 0, 310)
    # Uniform: 9 degrees of freedom, so 45 is beyond one in 10^6.
    assert float(((counts - 60) ** 2 / 60).sum()) < 45
    assert len({tuple(row.tolist()) for row in negatives}) == 8


def _embedded(task: RankingTask, rows: Rows, table: torch.Tensor) -> Embedded:
    return embedded(task.draw(rows), table)


def test_softmax_is_the_weighted_cross_entropy_over_the_catalogue() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(NUM_ITEMS, 16), Transformer(_model(), NUM_ITEMS)
    task, rows = _task(targets_per_user=2, temperature=0.7), rows_of([12, 1, 2, 0])
    drawn = _embedded(task, rows, table)
    catalogue = Catalogue(table, 0, False)
    got = task.loss(backbone, drawn, rows, catalogue)
    user = backbone.encode_users(rows.users.repeat(2), drawn.vectors["history"])
    logits = user.double() @ table.double().T / 0.7
    each = F.cross_entropy(logits[drawn.tensors["row"]], drawn.tensors["target"], reduction="none")
    torch.testing.assert_close(got.total.double(), each.sum(), rtol=1e-5, atol=0)  # float32
    assert got.weight == 4


def test_bpr_is_the_mean_over_negatives_written_out() -> None:
    torch.manual_seed(0)
    table, backbone = torch.randn(300, 16), Transformer(_model(), 300)
    task = _task(loss="bpr", num_items=300, negatives=_uniform(20), temperature=0.7)
    rows = rows_of([60, 1, 70])
    drawn = _embedded(task, rows, table)
    got = task.loss(backbone, drawn, rows, None)
    user = backbone.encode_users(rows.users, drawn.vectors["history"]).detach().double()
    negatives = drawn.vectors["negatives"].values.view(3, 20, 16).double()
    positive = drawn.vectors["target"].values.double()
    total = 0.0
    for place, row in enumerate((0, 2)):  # a single item leaves nothing to predict
        for draw in range(20):
            margin = float(user[row] @ (positive[place] - negatives[row, draw])) / 0.7
            total += math.log(1 + math.exp(-margin)) / 20
    assert got.total.item() == pytest.approx(total, rel=1e-5)  # float32
    assert got.weight == 2


def test_bpr_gives_zero_where_the_user_took_the_whole_catalogue() -> None:
    table, backbone = torch.randn(4, 16), Transformer(_model(), 4)
    task, rows = _task(loss="bpr", num_items=4), rows_of([4])
    got = task.loss(backbone, _embedded(task, rows, table), rows, None)
    assert got.total == 0
    assert got.weight == 0


LEARNED: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, causal": {"attention": "causal"},
    "softmax, three targets": {"targets_per_cut": 3},
    "softmax, linear": {"head": "linear"},
    "bpr": {"loss": "bpr"},
    "bpr, causal": {"loss": "bpr", "attention": "causal"},
    "hinge": {"loss": "hinge", "margin": 0.5},
    "sampled softmax": {"negatives": {"num": 20}},
    "sampled softmax, mlp": {"negatives": {"num": 20}, "head": "mlp"},
    "listnet": {"loss": "listnet", "targets_per_cut": 3},
    "lambda": {"loss": "lambda", "targets_per_cut": 3},
    "lambda, ratings": {"loss": "lambda", "targets_per_cut": 3, "gain": "rating"},
    "approx_ndcg": {"loss": "approx_ndcg", "targets_per_cut": 3, "temperature": 0.2},
    "approx_ndcg, cross": {
        "loss": "approx_ndcg",
        "temperature": 0.2,
        "head": "mlp",
        "interactions": ["cross", "dot"],
    },
}
# Soft labels cost their entropy at least: of three equal targets, and of e against sixteen 1s.
FLOORS = {"softmax, three targets": 1.1, "listnet": 2.78}


@pytest.mark.parametrize("name", LEARNED)
def test_it_lowers_its_own_loss(
    cycle_with_features: PreparedDataset, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(losses, "EPOCHS", 16)  # of four steps
    settings = dict(LEARNED[name])
    attention = settings.pop("attention", "bidirectional")
    ranking = {"batch_size": 10, "learning_rate": 0.01, "warmup_steps": 0, **settings}
    config = tiny_config(
        cycle_with_features.path,
        FEATURES,
        model={"dim": 16, "num_layers": 1, "max_length": 8, "attention": attention},
        finetune={"ranking": {**ranking, "targets_per_user": 4}},
    )
    case = {"config": config.model_dump(mode="json")}
    found = losses.train(case, cycle_with_features, ranks)["losses"]
    means = torch.tensor(found).view(16, 4).mean(1) - FLOORS.get(name, 0)
    # Softmax starts at log 30 = 3.4, bpr at log 2; an epoch's mean moves by a few hundredths of it.
    assert means[-1] < 0.8 * means[0], means


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["inner", "linear", "mlp"])
def test_every_head_starts_at_the_inner_product(
    cycle_with_features: PreparedDataset, ranks: Ranks, head: str
) -> None:
    model = _model()
    config = RankingConfig.model_validate({"head": head, "loss": "bpr"})
    built = build_head(config, model, cycle_with_features)
    user, item = torch.randn(7, 16), torch.randn(30, 16)
    queries = built.of_users(torch.tensor([-1, 0, 1, 2, 3, 4, 5]), user)
    keys = built.of_items(torch.arange(30), item)
    torch.testing.assert_close(built.of_block(queries, keys), user @ item.T)
    torch.testing.assert_close(built.user_vectors(user), user)


def test_a_block_of_the_mlp_is_its_pairs_one_by_one(
    cycle_with_features: PreparedDataset, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RankingConfig.model_validate({"head": "mlp", "loss": "bpr"})
    head = build_head(config, _model(), cycle_with_features)
    assert isinstance(head, MlpHead)
    torch.nn.init.normal_(head.out.weight)
    queries = head.of_users(torch.arange(7), torch.randn(7, 16))
    keys = head.of_items(torch.arange(30), torch.randn(30, 16))
    monkeypatch.setattr(ranking_head, "PAIRS_AT_A_TIME", 65)  # two users of the seven
    block = head.of_block(queries, keys)
    none = RowDropout(0, None, "", torch.arange(1), torch.arange(1))
    for user in range(7):
        for item in range(30):
            (score,) = head.of_pairs(queries[user : user + 1], keys[item : item + 1], none)
            torch.testing.assert_close(block[user, item], score, rtol=1e-4, atol=1e-5)
    # The features of both sides are read.
    other_user = head.of_users(torch.full((7,), -1), queries[:, :16])
    other_item = head.of_items(torch.full((30,), -1), keys[:, :16])
    assert (head.of_block(other_user, keys) != block).all()
    assert (head.of_block(queries, other_item) != block).all()


def test_a_cosine_stays_one_after_the_linear_map() -> None:
    head = LinearHead(16, is_cosine=True)
    torch.nn.init.normal_(head.map.weight)
    mapped = head.user_vectors(F.normalize(torch.randn(5, 16), dim=1))
    torch.testing.assert_close(mapped.norm(dim=1), torch.ones(5))


# --- relevance ----------------------------------------------------------------------------------


def _relevance() -> Relevance:
    """Of users 0 and 1: relevant places with gains, items shown and when."""
    return Relevance(
        places=Jagged(torch.tensor([2, 4, 5, 3]), torch.tensor([0, 3, 4])),
        gains=torch.tensor([1.0, 2, 3, 5]),
        shown=Jagged(torch.tensor([50, 51, 52, 53, 60]), torch.tensor([0, 4, 5])),
        num_before=torch.tensor([0, 2, 2, 5, 4]),
    )


def test_targets_are_relevant_items_and_negatives_first_what_was_shown_after_the_cut() -> None:
    task = _task(
        loss="lambda",
        targets_per_cut=2,
        negatives=_uniform(5),
        relevance=_relevance(),
        num_items=80,
    )
    seen = {}
    for step in range(30):
        rows = rows_of([6, 5], step)
        # Items below 80, so that both users' are in the catalogue
        rows = dataclasses.replace(
            rows, histories=rows.histories.with_values(rows.histories.values % 100 + 10)
        )
        draw = task.draw(rows)
        target, gain = draw.lookups["target"], draw.tensors["gain"]
        negatives = draw.lookups["negatives"].values.view(2, 5)
        log_q = draw.tensors["log_q"]
        first = int(target.values[0]) - 10
        num = int(target.lengths[0])
        seen[first] = (
            target.values[:num].tolist(),
            gain[:num].tolist(),
            [i for i, q in zip(negatives[0].tolist(), log_q[0].tolist(), strict=True) if q == 0],
        )
        assert target.values[num:].tolist() == [13]
        assert gain[num:].tolist() == [5]
        assert negatives[1, 0] == 60  # shown after 4 taken, the cut is at 3
        assert not set(negatives.flatten().tolist()) & set(range(10, 15))
        assert 60 not in negatives[1, 1:]
        # 80 items, 5 taken and 1 shown; 4 of 5 draws count.
        torch.testing.assert_close(log_q[1, 1:], torch.full((4,), math.log(4 / 74)))
    # At most half of five negatives, rounded up
    assert seen == {
        2: ([12, 14], [1, 2], [51, 52, 53]),
        4: ([14, 15], [2, 3], [53]),
        5: ([15], [3], [53]),
    }


def test_a_padding_row_was_shown_nothing() -> None:
    users = torch.tensor([-1, 1, 0])
    shown = _relevance().shown_after(users, torch.tensor([0, 9, 1]), most=2)
    assert shown.lengths.tolist() == [0, 0, 2]
    assert shown.values.tolist() == [51, 52]


def _labelled(tmp_path: Path, rows: list[tuple[str, str, int, int]]) -> PreparedDataset:
    """From (user, item, click, rating) in time order, all training but the last of each user."""
    last = {row[0]: place for place, row in enumerate(rows)}
    lines = [
        f"{user},{item},{click},{rating},{place},{'valid' if last[user] == place else 'train'}"
        for place, (user, item, click, rating) in enumerate(rows)
    ]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,c,r,t,s", *lines]) + "\n")
    columns = {"label": "c", "rating": "r", "timestamp": "t", "split": "s"}
    config = DataConfig.model_validate(
        {
            "format": "csv",
            "path": tmp_path / "log.csv",
            "columns": columns,
            "split": {"rule": "given"},
        }
    )
    prepare(config, tmp_path / "out", seed=0)
    return PreparedDataset.load(tmp_path / "out")


ROWS = [
    ("a", "n", 0, 3),
    ("a", "p", 1, 5),
    ("a", "o", 0, 3),
    ("a", "q", 1, 2),
    ("a", "p", 0, 3),  # taken before: no negative
    ("a", "r", 1, 4),
    ("a", "o", 0, 1),
    ("a", "s", 1, 4),
    ("b", "s", 0, 3),
    ("b", "p", 1, 1),
]


def _load(data: PreparedDataset, **settings: Any) -> tuple[Relevance, list[list[str]]]:
    config = RankingConfig.model_validate({"loss": "bpr", **settings})
    relevance = load_relevance(config, data, 0)
    assert relevance.shown is not None
    names = data.items["external_id"]
    parts = relevance.shown.values.split(relevance.shown.lengths.tolist())
    return relevance, [names[part.tolist()].to_list() for part in parts]


def test_impressions_are_what_was_shown_in_training_and_never_taken_there(
    tmp_path: Path, ranks: Ranks
) -> None:
    data = _labelled(tmp_path, ROWS)
    relevance, shown = _load(data)
    assert shown == [["n", "o", "o"], ["s"]]
    assert relevance.num_before is not None
    assert relevance.num_before.tolist() == [0, 1, 3, 0]
    assert relevance.places is None
    config = RankingConfig(loss="bpr", impressions=False)
    assert load_relevance(config, data, 0).shown is None
    assert load_relevance(RankingConfig(), data, 0).shown is None  # the catalogue has no lists


def test_low_ratings_are_no_targets_and_may_be_negatives(tmp_path: Path, ranks: Ranks) -> None:
    data = _labelled(tmp_path, ROWS)
    relevance, shown = _load(data, positive_rating=4, gain="rating")
    assert shown == [["n", "o", "q", "o"], ["s"]]
    assert relevance.places is not None
    assert relevance.places.values.tolist() == [2]  # r; the first item has no history
    assert relevance.gains is not None
    assert relevance.gains.tolist() == [4]


def test_ratings_alone_give_negatives_where_they_are_asked_for(
    cycle: PreparedDataset, ranks: Ranks
) -> None:
    config = RankingConfig(loss="bpr", positive_rating=3)
    assert load_relevance(config, cycle, 0).shown is None
    _, shown = _load(cycle, positive_rating=3, impressions=True)
    assert sum(map(len, shown))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"impressions": True}, "impressions: needs items that were shown and not taken"),
        ({"positive_rating": 9}, "positive_rating: no user has a training item rated 9.0 or more"),
    ],
)
def test_what_the_data_lack_is_refused_in_one_line(
    cycle: PreparedDataset, ranks: Ranks, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=f"^finetune.ranking.{told}[^\n]*$"):
        load_relevance(RankingConfig.model_validate({"loss": "bpr", **settings}), cycle, 0)


@pytest.mark.parametrize("key", ["gain", "positive_rating"])
def test_ratings_that_are_not_there_are_refused_in_one_line(
    cycle: PreparedDataset, ranks: Ranks, key: str
) -> None:
    settings = {"gain": "rating"} if key == "gain" else {"positive_rating": 4}
    data = dataclasses.replace(cycle, rating=None)
    with pytest.raises(ValueError, match=f"^finetune.ranking.{key}: needs ratings[^\n]*$"):
        load_relevance(RankingConfig.model_validate(settings), data, 0)


def test_a_gain_of_zero_is_refused_in_one_line(cycle: PreparedDataset, ranks: Ranks) -> None:
    assert cycle.rating is not None
    data = dataclasses.replace(cycle, rating=cycle.rating - 1)
    with pytest.raises(ValueError, match=r"^finetune.ranking.gain: [^\n]* found 0; [^\n]*$"):
        load_relevance(RankingConfig(gain="rating"), data, 0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"head": "mlp"}, "the mlp head scores pair by pair, and softmax is over the whole"),
        ({"margin": 2.0}, 'margin is that of hinge, and loss is "softmax"'),
        ({"impressions": True}, "impressions are negatives of lists"),
        ({"interactions": ["fm"]}, 'interactions is of the mlp head, and head is "inner"'),
        (
            {"loss": "bpr", "head": "mlp", "interactions": ["fm", "fm"]},
            "each layer is named once",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RankingConfig.model_validate(settings)


def test_a_share_of_the_labels_leaves_as_many_targets_and_whole_histories(
    cycle: PreparedDataset, ranks: Ranks
) -> None:
    config = RankingConfig(label_fraction=0.4)
    relevance = load_relevance(config, cycle, 0)
    assert relevance.places is not None
    is_kept = labelled(cycle, 0.4, 0)
    for user, places in enumerate(parts_of(relevance.places)):
        begin = int(cycle.interactions.offsets[user])
        num_trained = int(cycle.history("train").lengths[user])
        assert places == [p for p in range(1, num_trained) if is_kept[begin + p]]
    task = RankingTask(config, _model(), cycle.item_counts, seed=0, relevance=relevance)
    drawn = task.draw(rows_of_ids(cycle, list(range(10))))
    whole = parts_of(cycle.history("train"))
    for row, target, history in zip(
        drawn.tensors["row"].tolist(),
        drawn.tensors["target"].tolist(),
        parts_of(drawn.lookups["history"].select(drawn.tensors["row"])),
        strict=True,
    ):
        assert any(
            [*history, target] == whole[row][place - len(history) : place + 1]
            for place in range(1, len(whole[row]))
        )
    none = {"label_fraction": 1e-9}
    with pytest.raises(ValueError, match=r"label_fraction: 1e-09 of the labels leaves no item"):
        load_relevance(RankingConfig.model_validate(none), cycle, 0)
