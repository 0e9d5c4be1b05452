"""Run a configuration as a job on a Ray cluster, or on a Ray started here.

    python -m cluster.submit CONFIG.toml --address http://HEAD:8265 [--follow]
    python -m cluster.submit CONFIG.toml --local [--nodes N]
    python -m cluster.submit status JOB      also: logs JOB, stop JOB, list

A cluster is sent the resolved configuration and, from a checkout, the sources; never data, and no
word of the user's in a shell command. With --local no sources are sent: the job runs by this
interpreter, on these sources, and relative paths mean what they mean to `torchrec-pt run`.
"""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.checks import (
    check_job_id,
    check_name,
    check_shared_paths,
    name_of,
    parse_workers,
    refuse_address,
)
from cluster.client import (
    Asked,
    connect,
    follow,
    mistakes_of,
    run_locally,
    without_rays_lines,
)
from cluster.client import submit as submit_to
from cluster.job_file import JOB_FILE, JobFile
from cluster.packing import Code, settle_code
from cluster.resources import Device
from cluster.versions import installed_versions
from torchrec_pt.config_file import load_config


class Ingest(str, Enum):
    local = "local"
    ray = "ray"


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
# Those of `cluster.tune`, too.
LocalNodes = Annotated[int, typer.Option(min=1, help="Of the Ray that --local starts.")]
OnDevice = Annotated[Device, typer.Option(help="auto: GPUs where the cluster has any.")]
Name = Annotated[str | None, typer.Option(help="Of the job; default: that of the run's folder.")]
SentCode = Annotated[
    Code | None, typer.Option(help="Send the sources here, or use the nodes' image.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a key; repeatable."),
]


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="CONFIG.toml")],
    address: Address = None,
    local: Annotated[
        bool, typer.Option("--local", help="Start a Ray here for this run, and follow it.")
    ] = False,
    nodes: LocalNodes = 1,
    follow_: Annotated[
        bool, typer.Option("--follow", help="Show the job's output until it ends.")
    ] = False,
    workers: Annotated[
        str,
        typer.Option(metavar="N|MIN:MAX", help="Processes that train together; MIN:MAX: elastic."),
    ] = "2",
    device: OnDevice = Device.auto,
    max_failures: Annotated[
        int, typer.Option(min=0, help="How often lost workers are started again.")
    ] = 3,
    resize_interval: Annotated[
        float,
        typer.Option(
            min=1, metavar="SECONDS", help="Between two looks whether more workers fit (MIN:MAX)."
        ),
    ] = 60.0,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URI|PATH",
            help="Keep stages and checkpoints here too: s3://BUCKET/PREFIX, or a shared folder.",
        ),
    ] = None,
    ingest: Annotated[
        Ingest, typer.Option(help="Who reads the raw log: one process, or Ray Data.")
    ] = Ingest.local,
    name: Name = None,
    code: SentCode = None,
    allow_other_versions: Annotated[
        bool, typer.Option(help="Run where torch, torchrec or ray differ from those here.")
    ] = False,
    set_: Overrides = None,
) -> None:
    """Submit a run (what happens where no command is named)."""
    settings = load_config(config, set_ or [])
    fewest, most = parse_workers(workers)
    job = JobFile(
        name=name_of(settings) if name is None else check_name(name),
        config=settings.model_dump(mode="json"),
        folder=Path.cwd() if local else None,
        min_workers=fewest,
        max_workers=most,
        device=device,
        max_failures=max_failures,
        resize_interval_s=resize_interval,
        storage=storage,
        ingest=ingest.value,
        versions=installed_versions(),
        allow_other_versions=allow_other_versions,
    )
    asked = Asked("cluster.entry", JOB_FILE, job)
    if local:
        refuse_address(address)
        raise typer.Exit(run_locally(asked, num_nodes=nodes, num_cpus=most))
    check_shared_paths(settings, storage)
    raise typer.Exit(submit_to(address, asked, settle_code(code), is_followed=follow_))


@app.command()
def status(job: Job, address: Address = None) -> None:
    """One word: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    check_job_id(job)
    print(connect(address).get_job_status(job).value)


@app.command()
def logs(
    job: Job,
    address: Address = None,
    follow_: Annotated[
        bool, typer.Option("--follow", help="Until the job ends; its exit code is taken.")
    ] = False,
) -> None:
    """What a job has printed."""
    check_job_id(job)
    client = connect(address)
    if follow_:
        raise typer.Exit(follow(client, job))
    print(without_rays_lines(client.get_job_logs(job)), end="")


@app.command()
def stop(job: Job, address: Address = None) -> None:
    """Stop a job; the same run, submitted again, goes on from its last checkpoint."""
    check_job_id(job)
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


def main() -> None:
    """A mistake of the user is one line and exit code 2."""
    with mistakes_of("cluster.submit"):
        app()


if __name__ == "__main__":
    main()
