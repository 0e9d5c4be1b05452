"""A folder that is written whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_pt.data.errors import DataError
from torchrec_pt.files import cannot_write, fsync


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Let one process at a time work on `out`. The lock ends with the process, even a killed one.

    Raises:
        DataError: another process is at work, or the lock file beside `out` cannot be made.
    """
    path = out.with_name(f".{out.name}.lock")
    busy = DataError(f"{out}: must have one writer, another run is preparing it; wait for that run")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(cannot_write(out, error)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            raise DataError(cannot_write(out, error)) from None
        # A run that ended after we opened the file has removed it: our lock then guards nothing.
        if os.fstat(file.fileno()).st_nlink == 0:
            raise busy
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it takes the place of `out` when the block ends well.

    An error leaves `out` as it was. A kill does too, or, between the two renames, leaves no `out`.
    Leftovers of a killed run go away first.

    Raises:
        DataError: instead of an OSError (no space, no permission).
    """
    partial, replaced = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    try:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            fsync(path)
        if out.exists():
            out.rename(replaced)
        try:
            partial.rename(out)
        except OSError:
            if replaced.exists():
                replaced.rename(out)
            raise
        fsync(out.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise DataError(cannot_write(out, error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """Where a folder beside `out` may be made for work in progress; it goes away with the block.

    Raises:
        DataError: instead of an OSError (no space, no permission).
    """
    scratch = out.with_name(f".{out.name}.scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
    except OSError as error:
        raise DataError(cannot_write(out, error)) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
