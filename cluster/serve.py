"""Recommendations over HTTP with Ray Serve, from a finished run or a package of one.

    python -m cluster.serve FOLDER --local [--host 127.0.0.1] [--port 8000] [--replicas 1]
    python -m cluster.serve FOLDER --address HEAD:6379
    serve run cluster.serve:app folder=FOLDER

It listens on loopback unless --host says otherwise; what may be asked is in `serve_api`. Requests
for recommendations that come together are answered together. When the folder is replaced, each
replica loads the new export beside the old one and goes over to it without losing a request.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Annotated

import ray
import typer
from ray import serve
from ray.serve.context import _get_global_client

from cluster.client import mistakes_of
from cluster.nodes import LOOPBACK, LocalCluster
from cluster.serve_export import Retrieval, digest_of
from cluster.serve_replica import ServeArgs, server

NAME = "recommender"  # of the application


def app(args: ServeArgs) -> serve.Application:
    """What `serve run` and KubeRay's RayService build.

    Raises:
        ValueError: nothing to serve in the folder.
    """
    folder = args.folder.absolute()
    digest_of(folder.resolve())
    settled = args.model_copy(update={"folder": folder})
    return server.options(num_replicas=args.replicas).bind(settled)


def start(args: ServeArgs, *, address: str, host: str, port: int) -> None:
    """Serve on a Ray that runs; requests are answered when this returns.

    Raises:
        ValueError: nothing to serve in the folder, no Ray at the address, or one that serves HTTP
            elsewhere.
        RuntimeError: the replicas did not start; its last line says why.
    """
    application = app(args)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(
            address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True
        )
    except ConnectionError:
        raise ValueError(
            f"--address: no Ray answers at {address}; --local starts one here"
        ) from None
    serve.start(http_options={"host": host, "port": port})
    # A Serve that runs keeps the address that it was started with, and only logs that.
    client = _get_global_client()
    assert client is not None
    http = client.http_config
    if (http.host, http.port) != (host, port):
        raise ValueError(
            f"--port: this Ray serves HTTP at {http.host}:{http.port}, given {host}:{port}; "
            f"give --host {http.host} --port {http.port}, or end what it serves"
        )
    serve.run(application, name=NAME, logging_config={"enable_access_log": False})


cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def serve_folder(
    folder: Annotated[Path, typer.Argument(help="A finished run, or a package of one.")],
    host: Annotated[str, typer.Option(help="0.0.0.0: whoever reaches the machine.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
    watch: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Between looks for a new export; 0: none."),
    ] = 2.0,
    retrieval: Annotated[
        Retrieval, typer.Option(help="Score every item, or walk a graph of them.")
    ] = "exact",
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", metavar="HEAD:6379", help="A Ray that runs."),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Start a Ray here for it.")] = False,
) -> None:
    """Serve until Ctrl-C."""
    if not local and address is None:
        raise ValueError("--address: which Ray? give --address HEAD:6379; --local starts one here")
    args = ServeArgs(folder=folder, replicas=replicas, watch_s=watch, retrieval=retrieval)
    with contextlib.ExitStack() as stack:
        if local:
            digest_of(folder.resolve())  # a mistake costs no wait for Ray
            _check_free(host, port)
            num_cpus = max(replicas, os.cpu_count() or 1)
            address = stack.enter_context(LocalCluster(cpus_per_node=num_cpus)).address
        start(args, address=str(address), host=host, port=port)
        print(f"serving {folder} at http://{host}:{port}; Ctrl-C ends it", flush=True)
        _wait_for_signal()
        serve.delete(NAME)
        ray.shutdown()


def _check_free(host: str, port: int) -> None:
    """
    Raises:
        ValueError: something listens there, or it is no address of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--port: cannot listen at {host}:{port}, {error.strerror}; give another --port"
            ) from None


def _wait_for_signal() -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


def main() -> None:
    """A mistake of the user is one line and exit code 2."""
    with mistakes_of("cluster.serve"):
        cli()


if __name__ == "__main__":
    main()
