"""What every request meets before its route: limits of bodies, refusals of one line, metrics."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.serve_catalogue import UnknownIdError

MAX_BODY_BYTES = 1 << 20
MAX_DETAIL_CHARACTERS = 300
# From a cached answer to a model under 64 clients on two cores.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Metrics:
    """Of one replica, in Prometheus' text form; its name is a label of every figure."""

    def __init__(self, replica: str) -> None:
        disable_created_metrics()  # a series beside each that says when it began
        self._registry = CollectorRegistry()
        self._replica = replica
        self._requests = Counter(
            "torchrec_pt_requests",
            "Requests answered.",
            ["replica", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "torchrec_pt_request_seconds",
            "From a request's first byte here to its answer's last.",
            ["replica", "route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batch = Histogram(
            "torchrec_pt_batch_size",
            "Requests for recommendations that were answered together.",
            ["replica"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._registry,
        )
        self._exports = Counter(
            "torchrec_pt_exports",
            "Exports found in the folder, served or refused.",
            ["replica", "result"],
            registry=self._registry,
        )
        self._export = Gauge(
            "torchrec_pt_export_info",
            "1 for the export that is served.",
            ["replica", "digest"],
            registry=self._registry,
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(self._replica, route, status).inc()
        self._seconds.labels(self._replica, route).observe(seconds)

    def answered_together(self, size: int) -> None:
        self._batch.labels(self._replica).observe(size)

    def found_export(self, digest: str, is_served: bool) -> None:
        self._exports.labels(self._replica, "served" if is_served else "refused").inc()
        if is_served:
            self._export.clear()
            self._export.labels(self._replica, digest).set(1)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Measured:
    """Counts and times every HTTP request; paths that are no route go under `other`."""

    def __init__(self, app: App, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # nginx's for an asker who left before the answer
        start = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except BaseException:
            status = 500
            raise
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.answered(route, status, time.perf_counter() - start)


class LimitedBody:
    """Reads a POST's body before its route does: JSON, and MAX_BODY_BYTES at most.

    A page of another origin cannot send JSON without asking first, which is refused: so that
    nobody's browser is made to ask a server on their loopback.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            refused = _refusal(415, "content-type: must be application/json")
            await refused(scope, receive, send)
            return
        body = b""
        is_more = True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            is_more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                refused = _refusal(413, f"body: has {MAX_BODY_BYTES:,} bytes at most; ask for less")
                await refused(scope, receive, send)
                return
        is_given = False

        async def replayed() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, send)


def refuse_in_one_line(api: FastAPI) -> None:
    """Every refusal is {"detail": one line}: 404 an unknown id or path, 422 what is asked."""

    @api.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(422, _line(error))

    @api.exception_handler(UnknownIdError)
    async def of_id(_: Request, error: UnknownIdError) -> JSONResponse:
        return _refusal(404, str(error))

    @api.exception_handler(ValueError)
    async def of_value(_: Request, error: ValueError) -> JSONResponse:
        return _refusal(422, str(error))

    @api.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        refusal = _refusal(error.status_code, str(error.detail))
        refusal.headers.update(error.headers or {})
        return refusal


def _line(error: RequestValidationError) -> str:
    first, *others = error.errors()
    source, *path = first["loc"]
    if first["type"] == "json_invalid":
        return f"body: is no JSON, {first['ctx']['error']} at character {path[0]}"
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    rule = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(others)} more)" if others else ""
    return f"{field.removeprefix('.') or source}: {rule}{more}"


def _refusal(status: int, detail: str) -> JSONResponse:
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in detail)
    if len(printable) > MAX_DETAIL_CHARACTERS:
        printable = printable[:MAX_DETAIL_CHARACTERS] + "…"
    return JSONResponse({"detail": printable}, status)
