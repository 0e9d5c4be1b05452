"""The driver of a search inside the cluster: `python -m cluster.search_entry search.json`.

`cluster.tune` writes the file and makes this the job's entrypoint. The exit codes are those of
torchrec-pt.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import ray
import typer
from rich.console import Console

from cluster.client import mistakes_of
from cluster.job_file import SearchFile
from cluster.resources import use_gpus
from cluster.screen import screen_to
from cluster.search import ENVIRONMENT, search
from cluster.versions import check_versions, installed_versions
from cluster.work import Work
from torchrec_pt.config import RunConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, markup=False, emoji=False)


@app.command()
def entry(file: Annotated[Path, typer.Argument(metavar="search.json")]) -> None:
    """Run a search that `cluster.tune` described, on the Ray that this machine is of."""
    asked = SearchFile.model_validate_json(file.read_text(encoding="utf-8"))
    mismatch = check_versions(
        asked.versions, installed_versions(), allow_other=asked.allow_other_versions
    )
    if mismatch is not None:
        console.print(mismatch, highlight=False)
    if asked.folder is not None:
        os.chdir(asked.folder)
    config = RunConfig.model_validate(asked.config)
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    num_parallel, num_cpus, on_gpus = _shares(asked)
    console.print(
        f"Ray {ray.__version__}: {num_parallel} trials at a time, "
        f"each on {'a GPU' if on_gpus else f'CPUs ({num_cpus})'}",
        highlight=False,
    )
    with screen_to(sys.stdout) as screen:
        begun = search.options(runtime_env={"env_vars": ENVIRONMENT}).remote(
            Work(config, asked.folder, screen), num_parallel, num_cpus, int(on_gpus)
        )
        refused = ray.get(begun)
    if refused is not None:
        print(f"cluster.tune: {refused.message}", file=sys.stderr)
        raise typer.Exit(refused.exit_code)


def _shares(asked: SearchFile) -> tuple[int, int, bool]:
    """Trials at a time, CPUs of each, and whether each has a GPU.

    Raises:
        ValueError: more trials at a time than GPUs.
    """
    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    on_gpus = use_gpus(asked.device, asked.num_parallel or 1, num_gpus)
    num_parallel = asked.num_parallel or (max(1, num_gpus) if on_gpus else num_cpus)
    largest_node = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes())
    return num_parallel, max(1, min(largest_node, num_cpus // num_parallel)), on_gpus


def main() -> None:
    with mistakes_of("cluster.tune"):
        app()


if __name__ == "__main__":
    main()
