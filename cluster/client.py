"""The cluster as seen from outside: through the Jobs API on its dashboard, or started here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.job_file import JobFile, SearchFile
from cluster.nodes import LocalCluster
from cluster.packing import ROOT, Code, pack
from cluster.versions import check_versions, installed_versions
from torchrec_pt.files import refused

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

QUIET = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)

_OF_SUPERVISOR = (
    r"^(\S+ \S+\tINFO job_manager\.py:\d+ -- Runtime env is setting up\."
    r"|Running entrypoint for job .*: .* -m cluster\.\w+ \w+\.json)\n"
)


@dataclass(frozen=True)
class Asked:
    """A job before it is sent.

    Attributes:
        module: its driver; it is given the name of the file that holds `job`.
    """

    module: str
    file_name: str
    job: JobFile | SearchFile


def connect(address: str | None) -> JobSubmissionClient:
    """
    Raises:
        ValueError: no address, nothing answers there, or not without a token.
    """
    if address is None:
        raise ValueError(
            "--address: which cluster? give --address http://HEAD:8265 (or set "
            "RAY_API_SERVER_ADDRESS); --local starts a Ray here"
        )
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            f"--address: is the dashboard's, http://HEAD:8265, given {address!a}; a cluster's "
            "`ray start` and its RayCluster's head service name it"
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in QUIET:  # each sets its own level to INFO
        logging.getLogger(module).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ValueError(
            "--address: the cluster wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--address: {said}; is it the dashboard's address?") from None


def check_ray(client: JobSubmissionClient, *, allow_other: bool) -> None:
    """Of Ray before anything is sent; the job itself compares the other packages.

    Raises:
        ValueError: another Ray than here, which is not allowed.
    """
    # The client's own get_version() is that of the Jobs API.
    there = client._do_request("GET", "/api/version").json()["ray_version"]
    here = {"ray": installed_versions()["ray"]}
    check_versions(here, {"ray": there}, allow_other=allow_other)


def submit(address: str | None, asked: Asked, code: Code, *, is_followed: bool) -> int:
    """The exit code: of the job where it is followed, else 0.

    Raises:
        ValueError: no such cluster, one with another Ray, or one that refused the job.
    """
    client = connect(address)
    check_ray(client, allow_other=asked.job.allow_other_versions)
    sent = _send(client, "python", asked, code, {})
    print(f"submitted {sent}; its output: python -m cluster.submit logs {sent} --follow")
    return follow(client, sent) if is_followed else 0


def run_locally(asked: Asked, *, num_nodes: int, num_cpus: int) -> int:
    """The same job on a Ray started here for it, by this interpreter and on these sources.

    Args:
        num_cpus: what the nodes have together at least; more than the machine's cores is slow,
            but Ray would wait for more cores.
    Returns:
        The job's exit code; 130 where it was interrupted.
    """
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    num_cpus = max(num_cpus, os.cpu_count() or 1)
    with LocalCluster(num_nodes=num_nodes, cpus_per_node=-(-num_cpus // num_nodes)) as nodes:
        client = connect(nodes.dashboard)
        environment = {"PYTHONPATH": python_path}
        sent = _send(client, shlex.quote(sys.executable), asked, Code.image, environment)
        try:
            return follow(client, sent)
        except KeyboardInterrupt:
            client.stop_job(sent)
            _wait_for_end(client, sent)
            print("interrupted; the same command goes on from where it was", file=sys.stderr)
            return 130


def _send(
    client: JobSubmissionClient,
    python: str,
    asked: Asked,
    code: Code,
    environment: dict[str, str],
) -> str:
    """The job's id."""
    stamp = f"{datetime.now():%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory() as folder:
        pack(Path(folder), asked.file_name, asked.job, code)
        try:
            return str(
                client.submit_job(
                    # Ray hands it to a shell: no word of the user's is in it.
                    entrypoint=f"{python} -m {asked.module} {asked.file_name}",
                    submission_id=f"{asked.job.name}-{stamp}",
                    runtime_env={"working_dir": folder, "env_vars": environment},
                )
            )
        except RuntimeError as error:
            raise ValueError(
                f"--address: the cluster refused the job, {_last_line(error)}"
            ) from None


def follow(client: JobSubmissionClient, job: str) -> int:
    """Show the output of a job until it ends; its exit code."""

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            print(without_rays_lines(lines), end="", flush=True)

    asyncio.run(show())
    _wait_for_end(client, job)
    info = client.get_job_info(job)
    if info.driver_exit_code is None:
        print(f"job {job} {info.status.value}: {info.message}", file=sys.stderr)
        return 1
    return int(info.driver_exit_code)


def without_rays_lines(log: str) -> str:
    """Whole lines of a job's output without what Ray itself writes at its start."""
    return re.sub(_OF_SUPERVISOR, "", log, flags=re.MULTILINE)


def _wait_for_end(client: JobSubmissionClient, job: str) -> None:
    while not client.get_job_status(job).is_terminal():  # the log ends a moment earlier
        time.sleep(0.2)


@contextlib.contextmanager
def mistakes_of(program: str) -> Iterator[None]:
    """A mistake of the user is one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{program}: {refused(error)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        # The Jobs API: such as a job that does not exist.
        print(f"{program}: {_last_line(error)}", file=sys.stderr)
        sys.exit(1)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
