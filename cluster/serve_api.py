"""The HTTP application: its routes, in front of an export. No Ray is in it.

    POST /recommend /similar /score /rate /embed      JSON in, JSON out (`serve_requests`)
    GET  /                                            the web page
    GET  /items?query= /users?query= /history?user=   what the page asks
    GET  /health /metrics /openapi.json

A request that cannot be answered gets 4xx and {"detail": one line that names the field}: 404 for
an id or path that does not exist, 405, 413, 415, and 400 or 422 for what is malformed or asks for
what the run was not trained for. There is no /docs: FastAPI's loads its scripts from a CDN.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from fastapi.responses import FileResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

import torchrec_pt
from cluster import serve_answers as answers
from cluster import serve_requests as http
from cluster.serve_export import ServedExport
from cluster.serve_http import LimitedBody, Measured, Metrics, refuse_in_one_line

PAGE = Path(__file__).with_name("serve_page")
FOUND = 20  # items or users that a search shows
# The page needs nothing from elsewhere, and nothing may be put into it.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

RecommendTogether = Callable[[answers.Asked], Awaitable[http.Offered | ValueError]]
QueryText = Annotated[str, Query(max_length=100)]


def build_api(
    served: ServedExport, metrics: Metrics, recommend_together: RecommendTogether
) -> FastAPI:
    """
    Args:
        recommend_together: answers one request, with whatever others there are at the moment.
    """
    api = FastAPI(
        title="torchrec_pt",
        version=torchrec_pt.__version__,
        description="Recommendations from a trained run.",
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": http.Refusal}},
    )
    refuse_in_one_line(api)

    @api.post("/recommend", response_model=http.Offered)
    async def recommend(request: http.RecommendRequest) -> Response:
        """The k best items for a known user, or after a history of anybody."""
        asked = await asyncio.to_thread(answers.check_recommend, served.current, request)
        answer = await recommend_together(asked)
        if isinstance(answer, ValueError):
            raise answer
        return _json(answer)

    @api.post("/similar", response_model=http.Offered)
    async def similar(request: http.SimilarRequest) -> Response:
        """The k items most like an item."""
        return await _answered(answers.similar, request)

    @api.post("/score", response_model=http.Scored)
    async def score(request: http.ScoreRequest) -> Response:
        """Probabilities of a click where the run was fine-tuned for it, else ranking scores."""
        return await _answered(answers.score, request)

    @api.post("/rate", response_model=http.Rated)
    async def rate(request: http.RateRequest) -> Response:
        """The ratings that somebody would give, of a run that was fine-tuned for rating."""
        return await _answered(answers.rate, request)

    @api.post("/embed", response_model=http.Embedded)
    async def embed(request: http.EmbedRequest) -> Response:
        """Vectors of users, of histories or of items, a row each."""
        return await _answered(answers.embed, request)

    @api.get("/items", response_model=http.Found)
    async def items(query: QueryText = "") -> Response:
        """Items whose title contains the query, the most popular first."""
        return await _answered(answers.find_items, query, FOUND)

    @api.get("/users")
    async def users(query: QueryText = "") -> http.Users:
        """Known users whose id begins with the query."""
        return http.Users(users=served.current.catalogue.find_users(query, FOUND))

    @api.get("/history", response_model=http.Taken)
    async def history(user: Annotated[str, Query(max_length=http.MAX_ID_CHARACTERS)]) -> Response:
        """What a known user took, oldest first."""
        return await _answered(answers.taken, user)

    @api.get("/health")
    async def health() -> http.Health:
        """Which export is served."""
        export = served.current
        manifest = export.recommender.dataset.manifest
        return http.Health(
            status="ok",
            export=export.digest,
            num_users=manifest.num_users,
            num_items=manifest.num_items,
            refused=served.refused,
        )

    @api.get("/metrics", response_class=Response)
    async def of_prometheus() -> Response:
        """Of the replica that answers, in Prometheus' text form."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _answered(answer: Callable[..., BaseModel], *asked: Any) -> Response:
        return _json(await asyncio.to_thread(answer, served.current, *asked))

    for path, file in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        _add_page(api, path, PAGE / file)
    routes = frozenset(route.path for route in api.routes if hasattr(route, "path"))
    api.add_middleware(LimitedBody)
    api.add_middleware(Measured, metrics=metrics, routes=routes)
    return api


def _add_page(api: FastAPI, path: str, file: Path) -> None:
    @api.get(path, include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(file, headers=PAGE_HEADERS)


def _json(answer: BaseModel) -> Response:
    """Written by pydantic at once: what is not finite becomes null."""
    return Response(answer.model_dump_json(), media_type="application/json")
