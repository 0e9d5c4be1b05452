"""Run a configuration as a job on a Ray cluster, or on a Ray started here.

    python -m cluster.submit CONFIG.toml --address http://HEAD:8265 [--follow]
    python -m cluster.submit CONFIG.toml --local
    python -m cluster.submit status JOB      also: logs JOB, stop JOB, list

A cluster is sent the configuration file and nothing else: torchrec_pt has a compiled part,
and sources sent along would hide the package that was built into the cluster's image. With
--local nothing is sent: the job runs by this interpreter, on these sources, in the current
directory, so that relative paths mean what they mean to `torchrec-pt run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.resources import Device
from cluster.versions import installed_versions, write_versions
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config
from torchrec_pt.files import refused

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONFIG_NAME = "run.toml"
LOOPBACK = "127.0.0.1"
# The object store carries a configuration and a result, no data.
OBJECT_STORE_BYTES = 128 * 2**20


class _SubmitByDefault(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["submit", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_SubmitByDefault,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Runs as Ray jobs. `python -m cluster.submit CONFIG.toml` submits one.",
)
Job = Annotated[str, typer.Argument(help="The job's id, as submit and list show it.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="http://HEAD:8265",
        help="The cluster's dashboard.",
    ),
]


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="CONFIG.toml")],
    address: Address = None,
    local: Annotated[
        bool, typer.Option("--local", help="Start a Ray here for this run, and follow it.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the job's output until it ends.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 2,
    device: Annotated[
        Device, typer.Option(help="auto: GPUs where the cluster has any.")
    ] = Device.auto,
    max_failures: Annotated[
        int, typer.Option(min=0, help="How often lost workers are started again.")
    ] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Override a key; repeatable."),
    ] = None,
) -> None:
    """Submit a run (what happens where no command is named)."""
    overrides = set_ or []
    settings = load_config(config, overrides)
    options = [f"--workers={workers}", f"--device={device.value}", f"--max-failures={max_failures}"]
    if local:
        refuse_address(address)
        command = entrypoint(
            sys.executable, config.absolute(), [*options, f"--chdir={Path.cwd()}"], overrides
        )
        with local_ray(workers) as here:
            client = connect(here)
            job = client.submit_job(
                entrypoint=command, runtime_env={"env_vars": {"PYTHONPATH": python_path()}}
            )
            try:
                code = _follow(client, job)
            except KeyboardInterrupt:
                client.stop_job(job)
                print("interrupted; the same command goes on from the last checkpoint")
                code = 130
        raise typer.Exit(code)

    client = connect(address)
    check_shared_paths(settings)
    command = entrypoint("python", Path(CONFIG_NAME), options, overrides)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, Path(folder) / CONFIG_NAME)
        job = client.submit_job(entrypoint=command, runtime_env={"working_dir": folder})
    print(f"submitted {job}; its output: python -m cluster.submit logs {job} --follow")
    if follow:
        raise typer.Exit(_follow(client, job))


@app.command()
def status(job: Job, address: Address = None) -> None:
    """One word: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    print(connect(address).get_job_status(job).value)


@app.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job ends; its exit code is taken.")
    ] = False,
) -> None:
    """What a job has printed."""
    client = connect(address)
    if follow:
        raise typer.Exit(_follow(client, job))
    print(client.get_job_logs(job), end="")


@app.command()
def stop(job: Job, address: Address = None) -> None:
    """Stop a job; the same run, submitted again, goes on from its last checkpoint."""
    client = connect(address)
    # Ray answers whether the job was running.
    print("stopping" if client.stop_job(job) else f"was {client.get_job_status(job).value} already")


@app.command(name="list")
def list_jobs(address: Address = None) -> None:
    """The cluster's jobs, the newest last: id, status, start, command."""
    jobs = [job for job in connect(address).list_jobs() if job.submission_id is not None]
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        started = datetime.fromtimestamp((job.start_time or 0) / 1000)
        print(f"{job.submission_id}  {job.status:9}  {started:%Y-%m-%d %H:%M:%S}  {job.entrypoint}")


# --- what is submitted --------------------------------------------------------------------------


def entrypoint(python: str, config: Path, options: Sequence[str], overrides: Sequence[str]) -> str:
    """The job's shell command; every word of the user is quoted."""
    words = [python, "-m", "cluster.job", str(config), *options]
    words.append(f"--submitted-with={write_versions(installed_versions())}")
    return shlex.join([*words, *(f"--set={override}" for override in overrides)])


def check_shared_paths(config: RunConfig) -> None:
    """A job on a cluster starts in a folder that is deleted when it ends.

    Raises:
        ValueError: a relative path.
    """
    paths = {"run_dir": config.run_dir, "data.path": config.data.path}
    if config.data.prepared is not None:
        paths["data.prepared"] = config.data.prepared
    for key, path in paths.items():
        if not path.is_absolute():
            raise ValueError(
                f"{key}: on a cluster it must be absolute, on storage that every node sees, given "
                f'"{path}"; add --set {key}=/…, or use --local'
            )


def refuse_address(address: str | None) -> None:
    """--local beats the address of the environment, not that of the command line."""
    known = (os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    if address is not None and address not in known:
        raise ValueError("--local: starts a Ray of its own, given --address too; drop one of them")


def python_path() -> str:
    """Where the job finds this very `cluster` and torchrec_pt, before what was there."""
    sources = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [sources, os.environ.get("PYTHONPATH")]))


# --- the cluster --------------------------------------------------------------------------------


def connect(address: str | None) -> JobSubmissionClient:
    """
    Raises:
        ValueError: no address, nothing answers there, or not without a token.
    """
    if address is None:
        raise ValueError(
            "--address: which cluster? give --address http://HEAD:8265 (or set "
            "RAY_API_SERVER_ADDRESS); `submit` starts a Ray here with --local"
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("job.sdk", "dashboard_sdk"):  # each sets its own level to INFO
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ValueError(
            "--address: the cluster wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--address: {said}; is it the dashboard's address?") from None


@contextlib.contextmanager
def local_ray(num_workers: int) -> Iterator[str]:
    """A Ray of this process alone, which nothing outside this machine reaches.

    Yields:
        The address of its Jobs API.
    """
    # Ray replaces a loopback address by one that the network reaches, and listens there, unless
    # this says (it is read when ray is imported) that the machine will never be in a cluster.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    context = ray.init(
        "local",
        # More workers than cores is slow, but the user's wish; Ray would wait for more cores.
        num_cpus=max(num_workers, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=True,
        dashboard_host=LOOPBACK,
        _node_ip_address=LOOPBACK,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        assert ray.util.get_node_ip_address() == LOOPBACK, "ray was imported before local_ray"
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Show the output of a job until it ends; its exit code."""

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(show())
    while not client.get_job_status(job).is_terminal():  # the log ends a moment earlier
        time.sleep(0.2)
    info = client.get_job_info(job)
    if info.driver_exit_code is None:
        print(f"cluster.submit: job {job} {info.status.value}: {info.message}", file=sys.stderr)
        return 1
    return int(info.driver_exit_code)


def main() -> None:
    """A mistake of the user is one line and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"cluster.submit: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"cluster.submit: {refused(error)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        # The Jobs API: such as a job that does not exist.
        print(f"cluster.submit: {str(error).splitlines()[-1]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
