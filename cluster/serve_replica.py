"""What Ray Serve runs: one replica is a process with an export and the HTTP application."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from cluster import serve_requests as http
from cluster.nodes import LOOPBACK
from cluster.serve_answers import Asked, recommend_together
from cluster.serve_api import build_api
from cluster.serve_export import Retrieval, ServedExport
from cluster.serve_http import Metrics

MAX_BATCH = 64
MAX_ONGOING = 4 * MAX_BATCH  # requests of a replica at a time; others wait in the proxy
BATCH_WAIT_S = 0.002


class ServeArgs(BaseModel):
    """Attributes:
    folder: a finished run or a package, which every node sees.
    watch_s: seconds between two looks whether the folder was replaced; 0: none.
    retrieval: as Recommender.load takes it.
    """

    model_config = ConfigDict(extra="forbid")

    folder: Path
    replicas: int = Field(1, ge=1)
    watch_s: float = Field(2.0, ge=0)
    retrieval: Retrieval = "exact"


@serve.ingress()
class Server:
    def __init__(self, args: ServeArgs) -> None:
        _listen_where_the_node_does()
        self._metrics = Metrics(serve.get_replica_context().replica_tag)
        self._served = ServedExport(
            args.folder,
            interval_s=args.watch_s,
            retrieval=args.retrieval,
            report=self._metrics.found_export,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._served, self._metrics, self._recommend)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _recommend(self, asked: list[Asked]) -> list[http.Offered | ValueError]:
        self._metrics.answered_together(len(asked))
        return await asyncio.to_thread(recommend_together, asked)


def _listen_where_the_node_does() -> None:
    """Serve has a replica listen at every address of its machine; not where all else of the node
    is on loopback."""
    if ray.util.get_node_ip_address() != LOOPBACK:
        return
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server  # type: ignore[attr-defined]

    def add_loopback_port(grpc_server: Any, _: str) -> int:
        return int(add_port(grpc_server, f"{LOOPBACK}:0"))

    replica.add_port_to_grpc_server = add_loopback_port  # type: ignore[attr-defined]


server = serve.deployment(
    name="server", max_ongoing_requests=MAX_ONGOING, max_constructor_retry_count=1
)(Server)
