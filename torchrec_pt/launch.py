"""Worker processes of one command on this machine, by torch's elastic launcher.

The workers say nothing of how they failed: each leaves its line in the error file that
torchelastic gives it, and the launcher, which sees how all of them ended, says the one that counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchrec_pt.files import WriteError, write_json

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

RESUMES = "the same command resumes from the last checkpoint"
# In the environment of the workers: the process id of their launcher.
_LAUNCHER = "TORCHREC_PT_LAUNCHER"
# Until a worker that does not react to the signal to stop is killed.
_SHUTDOWN_S = 5


def is_worker() -> bool:
    """Whether `run_workers` started this process."""
    return _LAUNCHER in os.environ


def end_with_launcher() -> None:
    """Have the system stop this worker where its launcher is killed; torchelastic does not."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[_LAUNCHER]):
        sys.exit(1)


def leave_word(message: str, exit_code: int, *, is_consequence: bool) -> None:
    """What the launcher is to say of this worker's failure.

    Args:
        is_consequence: of another worker's, which is then said in its place.
    """
    with contextlib.suppress(WriteError):  # the launcher knows the exit code at least
        write_json(
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]),
            {
                "message": message,
                "timestamp": int(time.time()),
                "exit_code": exit_code,
                "is_consequence": is_consequence,
            },
        )


def run_workers(arguments: Sequence[str], num_workers: int, *, debug: bool) -> int:
    """`python -m torchrec_pt ARGUMENTS` in so many processes; what went wrong goes to stderr.

    Args:
        debug: show what torchelastic logs.
    Returns:
        The exit code: 0, that of the worker that failed first, 1 where it was killed, and
        128 + the signal that stopped all of them.
    Raises:
        ValueError: more workers than GPUs, or called in a worker.
        KeyboardInterrupt: after the workers were stopped.
    """
    if "RANK" in os.environ:
        raise ValueError("--workers: this process is a worker already; leave it to torchrun")

    import torch  # seconds, and the workers import it for themselves
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < num_workers:
        raise ValueError(
            f"--workers: {num_workers} workers need as many GPUs, this machine has {num_gpus}; "
            'ask for fewer, or hide the GPUs with CUDA_VISIBLE_DEVICES=""'
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // num_workers)))
    os.environ[_LAUNCHER] = str(os.getpid())
    if not debug:
        logging.disable()
    # torchelastic replaces ${local_rank} in arguments.
    command = ("-m", "torchrec_pt", *(one.replace("$", "$$") for one in arguments))
    with tempfile.TemporaryDirectory(prefix="torchrec_pt-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_workers,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            # Ctrl-C stays Python's own, and torchelastic then stops the workers by SIGTERM.
            signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
            shutdown_timeout=_SHUTDOWN_S,
        )
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            message, code = verdict(error.failures)
            print(message, file=sys.stderr)
            return code
        except SignalException as error:
            print(f"torchrec-pt: stopped by {error.sigval.name}; {RESUMES}", file=sys.stderr)
            return 128 + error.sigval
    return 0


def verdict(failures: Mapping[int, ProcessFailure]) -> tuple[str, int]:
    """What to say of workers that failed, and the exit code.

    Args:
        failures: rank -> how it ended, in the order in which torchelastic noticed; it stops
            the others by SIGTERM.
    """
    rank, cause = min(failures.items(), key=lambda item: _remoteness(item[1]))
    if "exit_code" in cause.error_file_data:
        return cause.message, int(cause.error_file_data["exit_code"])
    if cause.exitcode < 0:
        hint = " (out of memory?)" if cause.exitcode == -signal.SIGKILL else ""
        how = f"was killed by {cause.signal_name()}{hint}"
    else:
        how = f"ended with exit code {cause.exitcode}"
    return f"torchrec-pt: worker {rank} {how}, the others were stopped; {RESUMES}", 1


def _remoteness(failure: ProcessFailure) -> int:
    """From the first cause: a worker that was killed, or failed by itself, or was drawn along."""
    if failure.error_file_data.get("is_consequence"):
        return 3
    if failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT):
        return 2
    return 1 if failure.exitcode > 0 else 0
