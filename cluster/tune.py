"""Search a configuration's [tune.space] on a Ray cluster, or on a Ray started here.

    python -m cluster.tune CONFIG.toml --address http://HEAD:8265 [--follow]
    python -m cluster.tune CONFIG.toml --local [--nodes N]

The search is a job like any other (`python -m cluster.submit list`, `logs`, `stop`). Ray Tune runs
the trials side by side, with values that Optuna proposes, and ASHA stops those that fall behind.
trials.jsonl and best.toml are those of `torchrec-pt tune`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.checks import check_name, check_shared_paths, name_of, refuse_address
from cluster.client import Asked, mistakes_of, run_locally, submit
from cluster.job_file import SEARCH_FILE, SearchFile
from cluster.packing import settle_code
from cluster.resources import Device
from cluster.submit import Address, LocalNodes, Name, OnDevice, Overrides, SentCode
from cluster.versions import installed_versions
from torchrec_pt.config_file import load_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="CONFIG.toml")],
    address: Address = None,
    local: Annotated[
        bool, typer.Option("--local", help="Start a Ray here for it, and follow it.")
    ] = False,
    nodes: LocalNodes = 1,
    follow_: Annotated[
        bool, typer.Option("--follow", help="Show the search's output until it ends.")
    ] = False,
    trials: Annotated[
        int | None, typer.Option(min=1, help="In the place of tune.num_trials.")
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Trials at a time; default: one a GPU, or a CPU without GPUs."),
    ] = None,
    device: OnDevice = Device.auto,
    name: Name = None,
    code: SentCode = None,
    allow_other_versions: Annotated[
        bool, typer.Option(help="Search where torch, torchrec or ray differ from those here.")
    ] = False,
    set_: Overrides = None,
) -> None:
    """Search [tune.space] with Ray Tune, Optuna and ASHA."""
    overrides = [*(set_ or ()), *([f"tune.num_trials={trials}"] if trials else ())]
    settings = load_config(config, overrides)
    if settings.tune is None:
        raise ValueError("tune: no space to search is given; add [tune] and [tune.space]")
    job = SearchFile(
        name=name_of(settings) if name is None else check_name(name),
        config=settings.model_dump(mode="json", exclude_unset=True),
        folder=Path.cwd() if local else None,
        num_parallel=parallel,
        device=device,
        versions=installed_versions(),
        allow_other_versions=allow_other_versions,
    )
    asked = Asked("cluster.search_entry", SEARCH_FILE, job)
    if local:
        refuse_address(address)
        raise typer.Exit(run_locally(asked, num_nodes=nodes, num_cpus=parallel or 1))
    check_shared_paths(settings)
    raise typer.Exit(submit(address, asked, settle_code(code), is_followed=follow_))


def main() -> None:
    with mistakes_of("cluster.tune"):
        app()


if __name__ == "__main__":
    main()
