"""What is refused before anything is sent: one line each, where and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.job_file import NAME_PATTERN
from torchrec_pt.config import RunConfig

NAME_LENGTH = 63
# Ray's own (raysubmit_…), ours (name-stamp), and those that other tools gave.
JOB_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"


def check_name(name: str) -> str:
    """
    Raises:
        ValueError: it would not do as a part of file names and ids.
    """
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise ValueError(
            f"--name: begins with a letter or a digit, then letters, digits, . _ - ({NAME_LENGTH} "
            f"characters at most), given {_shown(name)}; choose another name"
        )
    return name


def name_of(config: RunConfig) -> str:
    """Of a job that is given none: that of the run's folder, less what a name may not hold."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.run_dir.name).strip("._-")[:NAME_LENGTH]
    return name or "run"


def check_job_id(job: str) -> str:
    """It becomes a part of a URL.

    Raises:
        ValueError: it is no id.
    """
    if re.fullmatch(JOB_PATTERN, job) is None:
        raise ValueError(
            f"JOB: an id is letters, digits, . _ -, given {_shown(job)}; `list` shows the ids"
        )
    return job


def parse_workers(text: str) -> tuple[int, int]:
    """`N`, or `MIN:MAX`, as (fewest, most).

    Raises:
        ValueError: neither, or fewer than one, or the most below the fewest.
    """
    found = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
    if found is not None:
        fewest = int(found[1])
        most = int(found[2] or fewest)
        if 1 <= fewest <= most:
            return fewest, most
    raise ValueError(
        f"--workers: is N, or MIN:MAX with 1 ≤ MIN ≤ MAX, given {_shown(text)}; such as "
        "--workers 2, or --workers 2:8"
    )


def check_shared_paths(config: RunConfig, storage: str | None = None) -> None:
    """A job on a cluster starts in a folder that is deleted when it ends.

    Raises:
        ValueError: a relative path.
    """
    for key, path in _paths(config):
        if not path.is_absolute():
            raise ValueError(
                f"{key}: on a cluster it must be absolute, on storage that every node sees, given "
                f'"{path}"; add --set {key}=/…, or use --local'
            )
    if storage is not None and "://" not in storage and not Path(storage).is_absolute():
        raise ValueError(
            f"--storage: on a cluster it must be absolute, or s3://BUCKET/PREFIX, given "
            f"{_shown(storage)}; or use --local"
        )


def refuse_address(address: str | None) -> None:
    """--local beats the address of the environment, not that of the command line.

    Raises:
        ValueError: both are given.
    """
    if address is not None and address != os.environ.get("RAY_API_SERVER_ADDRESS"):
        raise ValueError("--local: starts a Ray of its own, given --address too; drop one of them")


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """Dotted key and value of every path in a section."""
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name), f"{key}.{name}" if key else name)


def _shown(text: str) -> str:
    """In quotes, on one line, not longer than a line."""
    quoted = ascii(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:76]}…'"
