"""From a request to the Recommender's answer and back, without HTTP.

Every function takes the export that it asks, checks the ids first, and answers as the call in
Python does. ValueErrors are the asker's; UnknownIdError is one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster import serve_requests as http
from cluster.serve_catalogue import Catalogue
from cluster.serve_export import Export
from torchrec_pt.explanations import Reason
from torchrec_pt.item_filter import ItemFilter
from torchrec_pt.recommender import Recommendation


@dataclass(frozen=True)
class Asked:
    """A question that has been checked, with the export that answers it."""

    export: Export
    request: http.RecommendRequest


def check_recommend(export: Export, request: http.RecommendRequest) -> Asked:
    """
    Raises:
        UnknownIdError
    """
    _check_asker(export.catalogue, request.user, request.history)
    _check_filter(export.catalogue, request.filter)
    return Asked(export, request)


def recommend_together(asked: Sequence[Asked]) -> list[http.Offered | ValueError]:
    """The answer to each, in order: those with the same options are answered by one call."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, one in enumerate(asked):
        options = one.request.model_dump_json(exclude={"user", "history"})
        key = (id(one.export), one.request.user is None, options)
        groups.setdefault(key, []).append(index)
    answers: dict[int, http.Offered | ValueError] = {}
    for members in groups.values():
        export = asked[members[0]].export
        try:
            found = _recommend(export, [asked[index].request for index in members])
        except ValueError as error:  # of the options that they share
            answers.update(dict.fromkeys(members, error))
            continue
        for index, items in zip(members, found, strict=True):
            answers[index] = http.Offered(items=_offered(export.catalogue, items))
    return [answers[index] for index in range(len(asked))]


def _recommend(
    export: Export, requests: Sequence[http.RecommendRequest]
) -> list[list[Recommendation]]:
    """Of requests that differ in their users alone, or in their histories alone."""
    one = requests[0]
    users = [request.user for request in requests if request.user is not None]
    histories = [request.history for request in requests if request.history is not None]
    return export.recommender.recommend_many(
        users=users or None,
        histories=histories or None,
        k=one.k,
        exclude_seen=one.exclude_seen,
        filter=_filter(one.filter),
        diversity=one.diversity,
        explain=one.explain,
    )


def similar(export: Export, request: http.SimilarRequest) -> http.Offered:
    export.catalogue.check_item("item", request.item)
    _check_filter(export.catalogue, request.filter)
    found = export.recommender.similar_items(
        request.item, k=request.k, filter=_filter(request.filter)
    )
    return http.Offered(items=_offered(export.catalogue, found))


def score(export: Export, request: http.ScoreRequest) -> http.Scored:
    _check_asker(export.catalogue, request.user, request.history)
    export.catalogue.check_items("items", request.items)
    found = export.recommender.score(
        request.items, user=request.user, history=request.history, task=request.task
    )
    scores = [
        http.ScoredItem(item=item, score=value)
        for item, value in zip(found.items, found.values, strict=True)
    ]
    return http.Scored(task=found.task, scores=scores)


def rate(export: Export, request: http.RateRequest) -> http.Rated:
    _check_asker(export.catalogue, request.user, request.history)
    export.catalogue.check_items("items", request.items)
    found = export.recommender.predict_rating(
        request.items, user=request.user, history=request.history
    )
    ratings = [
        http.RatedItem(item=item, rating=value)
        for item, value in zip(found.items, found.values, strict=True)
    ]
    return http.Rated(ratings=ratings)


def embed(export: Export, request: http.EmbedRequest) -> http.Embedded:
    catalogue, recommender = export.catalogue, export.recommender
    vectors: npt.NDArray[np.float32]
    if request.users is not None:
        for index, user in enumerate(request.users):
            catalogue.check_user(f"users[{index}]", user)
        vectors = recommender.embed_users(request.users)
    elif request.histories is not None:
        for index, history in enumerate(request.histories):
            catalogue.check_items(f"histories[{index}]", history)
        vectors = recommender.embed_users(histories=request.histories)
    else:
        assert request.items is not None
        catalogue.check_items("items", request.items)
        vectors = recommender.embed_items(request.items)
    return http.Embedded(dim=vectors.shape[1], vectors=vectors.tolist())


def taken(export: Export, user: str | int) -> http.Taken:
    export.catalogue.check_user("user", user)
    items = export.catalogue.history(user)
    return http.Taken(user=user, items=_titled(export.catalogue, items))


def find_items(export: Export, query: str, limit: int) -> http.Found:
    found = export.catalogue.find_items(query, limit)
    return http.Found(items=_titled(export.catalogue, found))


def _check_asker(
    catalogue: Catalogue, user: str | int | None, history: Sequence[str | int] | None
) -> None:
    if user is not None:
        catalogue.check_user("user", user)
    catalogue.check_items("history", history or ())


def _check_filter(catalogue: Catalogue, given: http.FilterRequest | None) -> None:
    if given is not None:
        catalogue.check_items("filter.only", given.only or ())
        catalogue.check_items("filter.without", given.without)


def _filter(given: http.FilterRequest | None) -> ItemFilter | None:
    if given is None:
        return None
    return ItemFilter(where=given.where, only=given.only, without=given.without)


def _titled(catalogue: Catalogue, items: Sequence[str | int]) -> list[http.Item]:
    titles = catalogue.titles(items)
    return [http.Item(item=item, title=title) for item, title in zip(items, titles, strict=True)]


def _offered(catalogue: Catalogue, found: Sequence[Recommendation]) -> list[http.OfferedItem]:
    titles = catalogue.titles([one.item for one in found])
    return [
        http.OfferedItem(
            item=one.item,
            title=title,
            score=one.score,
            features=one.features,
            because=_reasons(catalogue, one.because),
        )
        for one, title in zip(found, titles, strict=True)
    ]


def _reasons(catalogue: Catalogue, because: Sequence[Reason]) -> list[http.Reason]:
    titles = catalogue.titles([why.item for why in because])
    return [
        http.Reason(item=why.item, title=title, share=why.share)
        for why, title in zip(because, titles, strict=True)
    ]
