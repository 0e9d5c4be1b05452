"""torchrec-pt: the stages of a run from the shell."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from torchrec_pt import checkpoint_commands
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain user and item representations, fine-tune them, rank, export.",
)
app.add_typer(checkpoint_commands.app, name="checkpoint")

Config = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="CONFIG.toml")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a key; repeatable.")
]
console = Console(soft_wrap=True, markup=False, emoji=False)
_debug = False


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global _debug
    _debug = debug


@app.command()
def run(config: Config, set_: Set = None) -> None:
    """Every stage: prepare, pretrain, finetune, evaluate, export, recommend, report."""
    from torchrec_pt import pipeline, tables

    settings = load_config(config, set_ or ())
    with _interruptible():
        result = pipeline.run(settings, console)
    if _is_first():
        tables.print_run(result, settings, console)


@app.command()
def prepare(config: Config, set_: Set = None) -> None:
    """Raw logs to the prepared dataset."""
    _stage("prepare", config, set_)


@app.command()
def pretrain(config: Config, set_: Set = None) -> None:
    """Self-supervised pretraining."""
    _stage("pretrain", config, set_)


@app.command()
def finetune(config: Config, set_: Set = None) -> None:
    """Fine-tune the pretrained model for each task, and its from-scratch control."""
    _stage("finetune", config, set_)


@app.command()
def evaluate(config: Config, set_: Set = None) -> None:
    """Test every model of the run on every task."""
    from torchrec_pt import tables

    result = _stage("evaluate", config, set_)
    if _is_first():
        tables.print_evaluation(result, console)


@app.command()
def export(config: Config, set_: Set = None) -> None:
    """Item and user embeddings to Parquet or NumPy files."""
    _stage("export_run", config, set_)


@app.command()
def report(config: Config, set_: Set = None) -> None:
    """The run so far as one HTML page: curves, metrics, what pretraining gave."""
    _stage("report_run", config, set_)


@app.command()
def recommend(
    config: Config,
    user: Annotated[str | None, typer.Option(help="External id of the user.")] = None,
    k: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    set_: Set = None,
) -> None:
    """Recommendations for one user, one JSON object a line."""
    from torchrec_pt import pipeline

    _, found = pipeline.recommend(load_config(config, set_ or ()), user, k)
    if _is_first():
        for one in found:
            line = {"item": one.item, "score": round(one.score, 6), **one.features}
            print(json.dumps(line, ensure_ascii=False, default=str))


@app.command()
def schema() -> None:
    """JSON schema of the configuration, for editors."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def doctor() -> None:
    """What is installed, which kernels are built, what this machine can do."""
    from torchrec_pt import doctor as checks

    if not checks.report(console):
        raise typer.Exit(1)


def _stage(name: str, config: Path, overrides: list[str] | None) -> Any:
    from torchrec_pt import pipeline

    stage: Callable[..., Any] = getattr(pipeline, name)
    with _interruptible():
        return stage(load_config(config, overrides or ()), console)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None


def _is_first() -> bool:
    """Whether this process speaks for a torchrun group."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """The console script: a mistake of the user is one line and exit code 2."""
    try:
        app()
    except ValueError as error:
        _give_up(error, str(error), 2)
    except OSError as error:
        from torchrec_pt.files import refused

        _give_up(error, refused(error), 2)
    except RuntimeError as error:
        if type(error).__module__.startswith("torchrec_pt"):
            _give_up(error, str(error), 1)
        raise


def _give_up(error: Exception, message: str, code: int) -> None:
    if _debug:
        raise error
    print(f"torchrec-pt: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)
