"""The driver of a job, on a machine of the cluster: `python -m cluster.entry job.json`.

`cluster.submit` writes the file and makes this the job's entrypoint. The exit codes are those of
torchrec-pt.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from pydantic import ValidationError
from rich.console import Console

from cluster.graph import run_graph
from cluster.job_file import JobFile
from cluster.resources import use_gpus
from cluster.screen import screen_to
from cluster.versions import installed_versions, version_mismatch
from cluster.worker import Work
from torchrec_pt.config import RunConfig
from torchrec_pt.files import refused

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, markup=False, emoji=False)


@app.command()
def entry(job: Annotated[Path, typer.Argument(metavar="job.json")]) -> None:
    """Run a job that `cluster.submit` described, on the Ray that this machine is of."""
    asked = load_job(job)
    _check_versions(asked)
    if asked.folder is not None:
        os.chdir(asked.folder)
    config = RunConfig.model_validate(asked.config)
    connection = ray.init(log_to_driver=False, logging_level=logging.ERROR)
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    on_gpus = use_gpus(asked.device, asked.min_workers, num_gpus)
    _say(f"Ray {ray.__version__}: {_workers(asked, on_gpus)}; {_dashboard(connection)}")
    with screen_to(sys.stdout) as screen:
        ended = run_graph(asked, Work(config, asked.folder, screen), on_gpus=on_gpus)
    if ended.run is not None:
        from torchrec_pt import tables

        tables.print_run(ended.run, config, console)
    for name, outcome in ended.outcomes.items():
        if outcome.state == "failed":
            _complain(f"{name}: {outcome.message}")
        elif outcome.state == "skipped":
            _complain(f"{name}: skipped, {outcome.message}")
    raise typer.Exit(ended.exit_code)


def load_job(path: Path) -> JobFile:
    """
    Raises:
        ValueError: no such file, or not one of ours.
    """
    try:
        return JobFile.model_validate_json(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read, {error.strerror}; check the path") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path}: {where}: {first['msg']}; submit the run again, it writes this file"
        ) from None


def _check_versions(job: JobFile) -> None:
    """
    Raises:
        ValueError: the submitting side had others, and has not said that they may differ.
    """
    mismatch = version_mismatch(job.versions, installed_versions())
    if mismatch is None:
        return
    if not job.allow_other_versions:
        raise ValueError(f"{mismatch}, or submit with --allow-other-versions")
    _say(mismatch)


def _workers(job: JobFile, on_gpus: bool) -> str:
    num = f"{job.min_workers} to {job.max_workers}"
    if job.min_workers == job.max_workers:
        num = str(job.max_workers)
    plural = "worker" if num == "1" else "workers"
    return f"{num} {plural} on {'GPUs' if on_gpus else 'CPUs'}"


def _dashboard(connection: Any) -> str:
    url = connection.dashboard_url
    return f"dashboard: http://{url}" if url else "no dashboard"


def _say(line: str) -> None:
    console.print(line, highlight=False)


def _complain(line: str) -> None:
    print(f"torchrec-pt: {line}", file=sys.stderr)


def main() -> None:
    """A mistake of the user is one line and exit code 2."""
    try:
        app()
    except ValueError as error:
        _complain(str(error))
        sys.exit(2)
    except OSError as error:
        _complain(refused(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
