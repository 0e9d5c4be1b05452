"""Search a configuration's [tune.space] on a Ray cluster, or on a Ray started here.

    python -m cluster.tune CONFIG.toml --address auto       also: ray://HEAD:10001
    python -m cluster.tune CONFIG.toml --local

Ray Tune runs the trials side by side, with values that Optuna proposes, and ASHA stops those that
fall behind. trials.jsonl and best.toml are those of `torchrec-pt tune`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.resources import Device, use_gpus
from cluster.submit import check_shared_paths, local_ray, python_path, refuse_address
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config
from torchrec_pt.files import refused

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, markup=False, emoji=False)


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="CONFIG.toml")],
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", metavar="auto|ray://HEAD:10001", help="The cluster."),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Start a Ray here for it.")] = False,
    trials: Annotated[
        int | None, typer.Option(min=1, help="In the place of tune.num_trials.")
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Trials at a time; default: one a GPU, or a CPU without GPUs."),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="auto: GPUs where the cluster has any.")
    ] = Device.auto,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Override a key; repeatable."),
    ] = None,
) -> None:
    """Search [tune.space] with Ray Tune, Optuna and ASHA."""
    overrides = [*(set_ or ()), *([f"tune.num_trials={trials}"] if trials else ())]
    settings = load_config(config, overrides)
    if settings.tune is None:
        raise ValueError("tune: no space to search is given; add [tune] and [tune.space]")
    if local:
        refuse_address(address)
    else:
        check_shared_paths(settings)
    with local_ray(parallel or 1) if local else _cluster(address):
        _run(settings, parallel, device, is_local=local)


def _run(config: RunConfig, parallel: int | None, device: Device, *, is_local: bool) -> None:
    import ray  # after local_ray has set its environment

    from cluster.screen import screen_to
    from cluster.search import ENVIRONMENT, search
    from cluster.work import Refused, Work

    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    on_gpus = use_gpus(device, parallel or 1, num_gpus)
    num_parallel = parallel or (max(1, num_gpus) if on_gpus else num_cpus)
    largest_node = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes())
    num_trial_cpus = max(1, min(largest_node, num_cpus // num_parallel))
    console.print(
        f"Ray {ray.__version__}: {num_parallel} trials at a time, "
        f"each on {'a GPU' if on_gpus else f'CPUs ({num_trial_cpus})'}",
        highlight=False,
    )
    environment = {**ENVIRONMENT, **({"PYTHONPATH": python_path()} if is_local else {})}
    with screen_to(sys.stdout) as screen:
        begun = search.options(runtime_env={"env_vars": environment}).remote(
            Work(config, Path.cwd() if is_local else None, screen),
            num_parallel,
            num_trial_cpus,
            int(on_gpus),
        )
        ended = ray.get(begun)
    if isinstance(ended, Refused):
        print(f"cluster.tune: {ended.message}", file=sys.stderr)
        raise typer.Exit(ended.exit_code)

    from torchrec_pt.trials import print_trials

    print_trials(ended.trials, console)
    console.print(f"The run with the best values: {ended.best}", highlight=False)


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """
    Raises:
        ValueError: no address, or nothing answers there.
    """
    if address is None:
        raise ValueError(
            "--address: which cluster? give --address auto on one of its machines, or "
            "ray://HEAD:10001 (or set RAY_ADDRESS); --local starts a Ray here"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--address: {said}; is the cluster up?") from None
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    """The exit codes are those of torchrec-pt."""
    try:
        app()
    except ValueError as error:
        print(f"cluster.tune: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"cluster.tune: {refused(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the trials that ended", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
