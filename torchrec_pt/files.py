"""Files that are whole once they bear their name, their hashes, and what the system refuses."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class WriteError(ValueError):
    """A file that the system did not let us write; the message is one line."""


def cannot_write(path: Path, error: OSError) -> str:
    """One line about a failed write: the path, the system's reason, what to do."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "free space" if is_full else "check free space and permissions"
    return (
        f"{path}: cannot be written, {_reason(error)}; {what} and run the same command again, "
        "it resumes"
    )


def refused(error: OSError) -> str:
    """One line about what the system refused where nobody expected it."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{_reason(error)}; mend that and run the same command again, it resumes"


def _reason(error: OSError) -> str:
    """In the system's words; a library may have put its own in their place."""
    return os.strerror(error.errno) if error.errno else str(error)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; it takes the place of `path` when the block ends well.

    Raises:
        WriteError: instead of an OSError (no space, no permission).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            fsync(partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(cannot_write(path, error)) from None


def fsync(path: Path) -> None:
    """Have the disk hold a file or folder before what follows is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_file(source: Path, target: Path) -> None:
    """The file once more, in a folder that is made for it; a copy where there are no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def link_files(source: Path, target: Path) -> None:
    """The files of a folder once more, not those of folders within."""
    for file in sorted(source.iterdir()):
        if file.is_file():
            link_file(file, target / file.name)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that a file that exists is whole.

    Raises:
        WriteError: no space, no permission.
    """
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, default=str))
