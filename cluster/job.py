"""The driver of a run inside the cluster: Ray Train workers around torchrec_pt's `run`.

`cluster.submit` makes it the entrypoint of a job; on a machine of the cluster,
`python -m cluster.job CONFIG.toml` works by itself.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import ray
import ray.train
import typer
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from cluster.resources import Device, use_gpus
from cluster.screen import SayFailures, failures, last_line, screen_to
from cluster.versions import installed_versions, read_versions, version_mismatch
from cluster.worker import Finished, Refused, Work, train_loop
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config
from torchrec_pt.files import refused

if TYPE_CHECKING:
    from torchrec_pt.pipeline import RunResult

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, markup=False, emoji=False)


@app.command()
def job(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml")],
    workers: Annotated[int, typer.Option(min=1)] = 2,
    device: Device = Device.auto,
    max_failures: Annotated[int, typer.Option(min=0)] = 1,
    chdir: Annotated[
        Path | None, typer.Option(help="Relative paths are taken from here, on every worker.")
    ] = None,
    submitted_with: Annotated[
        str, typer.Option(metavar="PACKAGE=VERSION,…", help="Versions on the submitting side.")
    ] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE")] = None,
) -> None:
    """The driver of a run on a Ray cluster."""
    if chdir is not None:
        os.chdir(chdir)
    settings = load_config(config, set_ or ())
    mismatch = version_mismatch(read_versions(submitted_with), installed_versions())
    if mismatch is not None:
        console.print(mismatch, highlight=False)
    result = run_on_ray(
        settings, num_workers=workers, device=device, max_failures=max_failures, folder=chdir
    )
    if isinstance(result, Refused):
        _give_up(result.message, result.exit_code)
    else:
        from torchrec_pt import tables

        tables.print_run(result, settings, console)


def run_on_ray(
    config: RunConfig,
    *,
    num_workers: int,
    device: Device = Device.auto,
    max_failures: int = 1,
    folder: Path | None = None,
) -> RunResult | Refused:
    """Every stage of the configuration on Ray Train workers.

    Args:
        max_failures: how often lost workers are started again; they go on from the last
            checkpoint under run_dir.
        folder: relative paths of the configuration are taken from here; default: from where
            Ray starts its workers.
    Raises:
        ValueError: more workers than GPUs.
        ray.train.TrainingFailedError: workers failed once too often.
    """
    # The environment of Ray Train's controller and workers; without these, every library's
    # INFO lines go to the console.
    os.environ["RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"] = "0"
    os.environ["RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING"] = "0"
    connection = ray.init(log_to_driver=False, logging_level=logging.ERROR)
    on_gpus = use_gpus(device, num_workers, int(ray.cluster_resources().get("GPU", 0)))
    console.print(
        f"Ray {ray.__version__}: {num_workers} workers on {'GPUs' if on_gpus else 'CPUs'}; "
        f"dashboard: http://{connection.dashboard_url}",
        highlight=False,
    )
    with screen_to(sys.stdout) as screen:
        trainer = TorchTrainer(
            train_loop,  # type: ignore[arg-type]  # Ray's own type has no room for a result
            train_loop_config=Work(config, folder, screen).as_dict(),
            torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo"),
            # One CPU is what Ray reserves for a worker, not all that it uses: see num_threads.
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=on_gpus,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if on_gpus else {})},
            ),
            run_config=ray.train.RunConfig(
                name=f"job-{ray.get_runtime_context().get_job_id()}",
                storage_path=str((config.run_dir / "ray").absolute()),
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                callbacks=[SayFailures(screen)],  # type: ignore[list-item]  # typed as of Tune
            ),
        )
        trained: Any = trainer.fit()
    outcome = trained.return_value
    if isinstance(outcome, Refused):
        return outcome
    assert isinstance(outcome, Finished)
    result: RunResult = pickle.loads(outcome.pickled_result)
    return result


def main() -> None:
    """The exit codes are those of torchrec-pt."""
    try:
        app()
    except ValueError as error:
        _give_up(str(error), 2)
    except OSError as error:
        _give_up(refused(error), 2)
    except ray.train.TrainingFailedError as error:
        said = failures(getattr(error, "worker_failures", {})) or last_line(error)
        _give_up(f"{said}; submitted again, the run goes on from its last checkpoint", 1)


def _give_up(message: str, code: int) -> None:
    print(f"torchrec-pt: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
