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

from cluster.client import mistakes_of
from cluster.graph import run_graph
from cluster.job_file import JobFile
from cluster.resources import num_places, use_gpus
from cluster.screen import screen_to
from cluster.stages import Outcomes
from cluster.storage import Storage
from cluster.versions import check_versions, installed_versions
from cluster.work import Work
from torchrec_pt.config_file import resolved

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, markup=False, emoji=False)


@app.command()
def entry(job: Annotated[Path, typer.Argument(metavar="job.json")]) -> None:
    """Run a job that `cluster.submit` described, on the Ray that this machine is of."""
    asked = load_job(job)
    mismatch = check_versions(
        asked.versions, installed_versions(), allow_other=asked.allow_other_versions
    )
    if mismatch is not None:
        _say(mismatch)
    if asked.folder is not None:
        os.chdir(asked.folder)
    config = resolved(asked.config)
    if asked.storage is not None:
        Storage.open(asked.storage, asked.name)  # a mistake is said before anything runs
    connection = ray.init(log_to_driver=False, logging_level=logging.ERROR)
    resources = ray.cluster_resources()
    on_gpus = use_gpus(asked.device, asked.min_workers, int(resources.get("GPU", 0)))
    _say(f"Ray {ray.__version__}: {_workers(asked, on_gpus)}; {_dashboard(connection)}")
    places = num_places(resources, on_gpus)
    if asked.min_workers > places:
        _say(f"the cluster has room for {places} of {asked.min_workers} workers; waiting for more")
    with screen_to(sys.stdout) as screen:
        ended = run_graph(asked, Work(config, asked.folder, screen), on_gpus=on_gpus)
    if ended.run is not None:
        from torchrec_pt import tables

        tables.print_run(ended.run, config, console)
    for line in complaints(ended.outcomes):
        print(f"torchrec-pt: {line}", file=sys.stderr)
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
        what = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
        raise ValueError(f"{path}: {what}; submit the run again, it writes this file") from None


def complaints(outcomes: Outcomes) -> list[str]:
    """A line for each stage that failed, and one for those that were skipped for it."""
    lines = [f"{name}: {one.message}" for name, one in outcomes.items() if one.state == "failed"]
    skipped = [name for name, one in outcomes.items() if one.state == "skipped"]
    return [*lines, f"not begun: {', '.join(skipped)}"] if skipped else lines


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


def main() -> None:
    with mistakes_of("torchrec-pt"):
        app()


if __name__ == "__main__":
    main()
