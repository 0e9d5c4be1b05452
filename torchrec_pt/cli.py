"""torchrec-pt: the stages of a run from the shell."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from torchrec_pt import checkpoint_commands, model_commands
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config, overridden
from torchrec_pt.files import refused
from torchrec_pt.launch import RESUMES, end_with_launcher, is_worker, leave_word, run_workers

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain user and item representations, fine-tune them, rank, export.",
)
app.add_typer(checkpoint_commands.app, name="checkpoint")
app.command()(model_commands.export_model)
app.command()(model_commands.quantize)

Config = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="CONFIG.toml")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a key; repeatable.")
]
Workers = Annotated[
    int, typer.Option("--workers", min=1, help="Processes on this machine that share the work.")
]
console = Console(soft_wrap=True, markup=False, emoji=False)
_debug = False


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global _debug
    _debug = debug
    if not debug:
        # Read when torch is loaded: its warnings of lost connections come with C++ stacks.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@app.command()
def run(config: Config, set_: Set = None, workers: Workers = 1) -> None:
    """Every stage: prepare, pretrain, finetune, evaluate, export, recommend, report."""
    from torchrec_pt import tables

    settings = load_config(config, set_ or ())
    result = _stage("run", config, set_, workers)
    if _is_first():
        tables.print_run(result, settings, console)


@app.command()
def prepare(config: Config, set_: Set = None, workers: Workers = 1) -> None:
    """Raw logs to the prepared dataset."""
    _stage("prepare", config, set_, workers)


@app.command()
def pretrain(config: Config, set_: Set = None, workers: Workers = 1) -> None:
    """Self-supervised pretraining."""
    _stage("pretrain", config, set_, workers)


@app.command()
def finetune(config: Config, set_: Set = None, workers: Workers = 1) -> None:
    """Fine-tune the pretrained model for each task, and its from-scratch control."""
    _stage("finetune", config, set_, workers)


@app.command()
def evaluate(config: Config, set_: Set = None, workers: Workers = 1) -> None:
    """Test every model of the run on every task."""
    from torchrec_pt import tables

    result = _stage("evaluate", config, set_, workers)
    if _is_first():
        tables.print_evaluation(result, console)


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(
            help="The run's TOML file, its folder, or a checkpoint in it.",
            metavar="CONFIG.toml|RUN|CHECKPOINT",
        ),
    ],
    what: Annotated[list[str] | None, typer.Option(help="items, users; repeatable.")] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(help="parquet, npy, safetensors, faiss, csv, jsonl; repeatable."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 (of safetensors), int8.")
    ] = None,
    index: Annotated[str | None, typer.Option(help="Of faiss: flat, ivf, hnsw, pq.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of that index: inner_product, cosine.")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Text file of external ids, one a line; default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: <run_dir>/export.")] = None,
    set_: Set = None,
    workers: Workers = 1,
) -> None:
    """Item and user embeddings to files; each option is a key of [export]."""
    given = {
        "what": what,
        "formats": format,
        "dtype": dtype,
        "index.kind": index,
        "index.metric": metric,
        "ids": ids and str(ids),
        "out": out and str(out),
    }
    options = [
        f"export.{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in given.items()
        if value
    ]
    _stage("export", run, [*(set_ or ()), *options], workers)


@app.command()
def report(config: Config, set_: Set = None) -> None:
    """The run so far as one HTML page: curves, metrics, what pretraining gave."""
    _stage("report", config, set_)


@app.command()
def tune(config: Config, set_: Set = None, workers: Workers = 1) -> None:
    """Search [tune.space] for better values, judged on validation; the best as a TOML file."""
    from torchrec_pt import trials

    found = _stage("tune", config, set_, workers)
    if _is_first():
        trials.print_trials(found.trials, console)
        console.print(f"The run with the best values: {found.best}", highlight=False)


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
def package(
    config: Config,
    out: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT")],
    set_: Set = None,
) -> None:
    """The finished run as a folder to hand on: model, data, a model card; no training leftovers."""
    from torchrec_pt.package import export_package

    made = export_package(load_config(config, set_ or ()).run_dir, out)
    console.print(f"package: {made}", highlight=False)


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


# Commands whose function has another name.
_STAGES = {"export": "export_run", "report": "report_run"}


def _stage(command: str, config: Path, overrides: list[str] | None, workers: int = 1) -> Any:
    """A stage here, or with `workers` in as many processes, whose end is then this one's.

    Args:
        config: of export, a folder too.
    """
    is_folder = command == "export" and config.is_dir()
    settings = (_config_of if is_folder else load_config)(config, overrides or ())
    with _interruptible():
        if workers > 1:
            arguments = [command, str(config), *(f"--set={one}" for one in overrides or ())]
            if _debug:
                arguments.insert(0, "--debug")
            try:
                raise typer.Exit(run_workers(arguments, workers, debug=_debug))
            finally:
                console.show_cursor()  # a worker that was stopped leaves it hidden

        from torchrec_pt import pipeline
        from torchrec_pt import tune as search
        from torchrec_pt.export import export_all

        module = search if command == "tune" else pipeline
        stage: Callable[..., Any] = getattr(module, _STAGES.get(command, command))
        with _joined():
            if is_folder:
                return export_all(config, settings.export, console)
            return stage(settings, console)


def _config_of(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """Of the run that the folder is, or lies in."""
    from torchrec_pt.runs import find_run, load_run_config

    return overridden(load_run_config(find_run(folder)), overrides)


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    """Of what several ranks meet, the first of them speaks; the others only end."""
    from torchrec_pt.distributed import is_first_to_fail, joined_ranks

    with joined_ranks():
        try:
            yield
        except Exception as error:
            if "RANK" not in os.environ:
                raise
            if not is_worker() and not is_first_to_fail():
                time.sleep(1)  # at the end of one rank torchrun stops the one that speaks
                _end(_said_of(error)[1])
            _fail(error)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if _is_first():
            print(f"interrupted; {RESUMES}", file=sys.stderr)
        raise typer.Exit(130) from None


def _is_first() -> bool:
    """Whether this process speaks for its group."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """The console script: a mistake of the user is one line and exit code 2."""
    if is_worker():
        end_with_launcher()
    try:
        app()
    except Exception as error:
        if _said_of(error)[0] is None and not is_worker():
            raise
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    line, code = _said_of(error)
    said = traceback.format_exc().rstrip() if line is None else line
    if is_worker():
        leave_word(said, code, is_consequence=_is_lost_worker(error))
    else:
        print(said, file=sys.stderr)
    _end(code)


def _said_of(error: Exception) -> tuple[str | None, int]:
    """The line for the user, None where a traceback is due, and the exit code."""
    is_mendable = isinstance(error, ValueError | OSError)
    is_known = is_mendable or type(error).__module__.startswith("torchrec_pt")
    code = 2 if is_mendable and not _debug else 1
    if _debug or not is_known:
        return None, code
    message = refused(error) if isinstance(error, OSError) else str(error)
    if _is_lost_worker(error):
        message = f"{message}; {RESUMES}"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not isinstance(error, ValueError):
        message = f"rank {os.environ['RANK']}: {message}"
    return f"torchrec-pt: {' '.join(message.splitlines())}", code


def _is_lost_worker(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from torchrec_pt.distributed import LostWorkerError

    return isinstance(error, LostWorkerError)


def _end(code: int) -> NoReturn:
    """Exit, from among other ranks at once.

    The traceback holds modules that hold the process group, whose threads then outlive it and
    abort a process that ends slowly.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
