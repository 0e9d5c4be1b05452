"""The serving face, against what its parts say one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import NUM_ITEMS
from torchrec_pt import ItemFilter, Recommender
from torchrec_pt.config import RunConfig
from torchrec_pt.data.errors import DataError
from torchrec_pt.distributed import joined_ranks

HISTORY = ["i3", "i4", "i5"]


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with joined_ranks():
        yield


@pytest.fixture(scope="module")
def recommender(finished_run: RunConfig) -> Recommender:
    return Recommender.load(finished_run.run_dir)


def _ids(found: Any) -> list[str]:
    return [one.item for one in found]


def _order(recommender: Recommender, user: str) -> list[str]:
    """All items, best first, by the vectors that the face gives away."""
    scores = recommender.embed_items() @ recommender.embed_users([user])[0]
    return recommender.dataset.items["external_id"][np.argsort(-scores, kind="stable")].to_list()


def _seen(recommender: Recommender, user: str) -> list[str]:
    place = recommender.dataset.user_index(user)
    seen = recommender.dataset.history("test").select(torch.tensor([place])).values
    return recommender.dataset.items["external_id"][seen.numpy()].to_list()


def test_a_list_is_the_head_of_all_inner_products_without_the_seen(
    recommender: Recommender,
) -> None:
    for user in ("u1", "u20"):
        order, seen = _order(recommender, user), set(_seen(recommender, user))
        assert _ids(recommender.recommend(user, k=6)) == [i for i in order if i not in seen][:6]
        assert _ids(recommender.recommend(user, k=6, exclude_seen=False)) == order[:6]


def test_many_at_once_get_what_each_gets_alone(recommender: Recommender) -> None:
    users = ["u5", "u1", "u30", "u1"]
    together = recommender.recommend_many(users, k=4, diversity=0.3, explain=True)
    for user, found in zip(users, together, strict=True):
        alone = recommender.recommend(user, k=4, diversity=0.3, explain=True)
        assert _ids(found) == _ids(alone)
        assert [one.score for one in found] == pytest.approx([one.score for one in alone], rel=1e-4)
        assert [_ids(one.because) for one in found] == [_ids(one.because) for one in alone]
    histories = [HISTORY, [], ["i9"]]
    for history, found in zip(
        histories, recommender.recommend_many(histories=histories, k=4), strict=True
    ):
        assert _ids(found) == _ids(recommender.recommend(history=history, k=4))
    assert recommender.recommend_many([]) == []


def test_threads_get_the_answers_that_one_gets(finished_run: RunConfig) -> None:
    fresh = Recommender.load(finished_run.run_dir)  # whose other models are loaded in the rush
    users = [f"u{number}" for number in range(12)] * 4

    def ask(user: str) -> Any:
        return (
            fresh.recommend(user, k=5, diversity=0.5, explain=True),
            fresh.score(["i1", "i2"], user=user),
            fresh.predict_rating(["i1"], history=HISTORY),
        )

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, users))
    assert found == [ask(user) for user in users]


def test_filters_keep_the_order_and_leave_what_passes(recommender: Recommender) -> None:
    order = _order(recommender, "u1")
    rows = recommender.dataset.items.to_dicts()
    kinds = {row["external_id"]: row["kinds"] or () for row in rows}
    colour = {row["external_id"]: row["colour"] for row in rows}

    def offered(**conditions: Any) -> list[str]:
        return _ids(
            recommender.recommend(
                "u1", k=NUM_ITEMS, exclude_seen=False, filter=ItemFilter(**conditions)
            )
        )

    assert offered(where={"colour": ["blue"]}) == [i for i in order if colour[i] == "blue"]
    has_any = [i for i in order if {"a", "c"} & set(kinds[i])]
    assert offered(where={"kinds": ["a", "c", "unheard of"]}) == has_any
    both = [i for i in has_any if colour[i] == "red"]
    assert offered(where={"kinds": ["a", "c"], "colour": ["red"]}) == both
    assert offered(only=["i4", "i2", "i2"]) == [i for i in order if i in ("i2", "i4")]
    assert offered(only=[]) == []
    assert offered(without=["i4"]) == [i for i in order if i != "i4"]
    similar = recommender.similar_items("i4", k=NUM_ITEMS, filter=ItemFilter(only=["i4", "i7"]))
    assert _ids(similar) == ["i7"]


def test_similar_items_are_those_of_the_largest_cosine(recommender: Recommender) -> None:
    vectors = recommender.embed_items()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit[recommender.dataset.item_index("i4")]
    order = recommender.dataset.items["external_id"][np.argsort(-cosine)].to_list()
    assert order[0] == "i4"
    found = recommender.similar_items("i4", k=5)
    assert _ids(found) == order[1:6]
    assert [one.score for one in found] == pytest.approx(sorted(cosine)[::-1][1:6], abs=1e-5)


def test_diversity_chooses_among_the_best_and_zero_changes_nothing(
    recommender: Recommender,
) -> None:
    plain = recommender.recommend("u1", k=8)
    assert recommender.recommend("u1", k=8, diversity=0.0) == plain
    diverse = recommender.recommend("u1", k=8, diversity=0.9)
    assert diverse[0] == plain[0]

    def likeness(found: Any) -> float:
        vectors = recommender.embed_items(_ids(found))
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return float((unit @ unit.T).mean())

    assert likeness(diverse) < likeness(plain)
    assert len({one.item for one in diverse}) == 8


def test_reasons_are_items_of_the_history_nearest_first(recommender: Recommender) -> None:
    found = recommender.recommend(history=HISTORY, k=3, explain=True)
    vectors = recommender.embed_items(HISTORY)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for one in found:
        offered = recommender.embed_items([one.item])[0]
        cosine = (unit @ offered / np.linalg.norm(offered)).clip(0)
        shares = dict(zip(HISTORY, cosine / max(cosine.sum(), 1e-30), strict=True))
        assert [why.share for why in one.because] == sorted(
            (why.share for why in one.because), reverse=True
        )
        assert {why.item: why.share for why in one.because} == pytest.approx(shares, abs=1e-5)
    json.dumps([asdict(one) for one in found])
    nothing = recommender.recommend(history=[], k=2, explain=True)
    assert [one.because for one in nothing] == [(), ()]


def test_scores_say_which_they_are(recommender: Recommender) -> None:
    items = ["i9", "i1"]
    clicks = recommender.score(items, user="u1")
    assert clicks.task == "ctr"
    assert all(0 < value < 1 for value in clicks.values)
    ranking = recommender.score(items, user="u1", task="ranking")
    offered = {one.item: one.score for one in recommender.recommend("u1", k=99, exclude_seen=False)}
    assert ranking.task == "ranking"
    assert ranking.values == pytest.approx([offered[item] for item in items], rel=1e-4)
    assert recommender.score(items, history=HISTORY).items == items


def test_a_rating_does_not_depend_on_what_else_is_asked(recommender: Recommender) -> None:
    found = recommender.predict_rating([f"i{number}" for number in range(5)], user="u2")
    assert found.task == "rating"
    assert all(0 < value < 7 for value in found.values)
    one_by_one = [recommender.predict_rating([item], user="u2").values[0] for item in found.items]
    assert found.values == pytest.approx(one_by_one, rel=1e-4)


def test_new_items_get_what_their_features_make(recommender: Recommender) -> None:
    new = recommender.embed_items(
        features=[
            {"colour": "red", "kinds": "a|b"},
            {"kinds": "b|a", "colour": "red"},
            {"colour": "green"},
            {},
        ]
    )
    assert new.shape == (4, 16)
    np.testing.assert_allclose(new[0], new[1], atol=1e-6)
    np.testing.assert_allclose(new[2], new[3], atol=1e-6)  # an unknown colour is no colour
    assert not np.allclose(new[0], new[2])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.recommend(), "give either user or history"),
        (lambda r: r.recommend("u1", history=["i1"]), "give either user or history"),
        (lambda r: r.recommend("u77"), 'user "u77": not in the prepared dataset .*did you mean'),
        (lambda r: r.recommend(history=["i1", "x"]), 'item "x": not in the prepared dataset'),
        (lambda r: r.recommend(history="i1"), "must be a list of ids"),
        (lambda r: r.recommend_many(["u1", "nobody"]), 'user "nobody"'),
        (lambda r: r.recommend("u1", k=0), "recommend.k: must be 1 or more, given 0"),
        (lambda r: r.recommend("u1", diversity=1.5), "diversity: must be from 0 to 1, given 1.5"),
        (
            lambda r: r.recommend("u1", filter=ItemFilter(where={"size": ["1"]})),
            'no item feature "size"; use some of colour, kinds',
        ),
        (lambda r: r.recommend("u1", filter=ItemFilter(only=["y"])), 'item "y"'),
        (lambda r: r.recommend("u1", filter=ItemFilter(without="i1")), "without: must be a list"),
        (lambda r: r.similar_items("y"), 'item "y"'),
        (lambda r: r.score(["i1"]), "score: give either user or history"),
        (lambda r: r.score(["i1"], user="u1", task="rating"), 'must be "ctr" or "ranking"'),
        (lambda r: r.predict_rating(["y"], user="u1"), 'item "y"'),
        (lambda r: r.embed_users(), "embed_users: give either user or history"),
        (lambda r: r.embed_items(["i1"], features=[{}]), "either items or features"),
        (lambda r: r.embed_items(features=[{"size": 1}]), 'no item feature "size"'),
        (
            lambda r: r.embed_items(features=[{"colour": "red"}, {"colour": ["blue"]}]),
            "colour must be values of one type",
        ),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    recommender: Recommender, ask: Callable[[Recommender], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ask(recommender)
    assert "\n" not in str(caught.value)


def test_ids_are_known_in_one_form_alone(recommender: Recommender) -> None:
    with pytest.raises(DataError):
        recommender.recommend("u01")


def test_a_graph_serves_inner_products_as_the_exact_search_does(
    finished_run: RunConfig, recommender: Recommender
) -> None:
    graph = Recommender.load(finished_run.run_dir, retrieval="hnsw")
    users = [f"u{number}" for number in range(10)]
    for options in ({}, {"exclude_seen": False}, {"filter": ItemFilter(without=["i1", "i2"])}):
        for a, b in zip(
            graph.recommend_many(users, k=5, **options),
            recommender.recommend_many(users, k=5, **options),
            strict=True,
        ):
            assert _ids(a) == _ids(b)  # so few items a walk meets all of
            assert [one.score for one in a] == pytest.approx([one.score for one in b], rel=1e-4)
    with pytest.raises(ValueError, match='must be "exact" or "hnsw", given "tree"'):
        Recommender.load(finished_run.run_dir, retrieval="tree")  # type: ignore[arg-type]
