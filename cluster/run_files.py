"""The side of `storage` that is on this node: the files of a run_dir, by stage."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO

from torchrec_pt.data.atomic import whole_or_nothing
from torchrec_pt.data.manifest import MANIFEST_NAME
from torchrec_pt.files import sha256, whole_file, write_json

BLOCK_BYTES = 8 << 20
RAY_FOLDER = "ray"  # Ray Train's own book-keeping, of no use on another cluster
_RECORD, _LOCK = ".storage.json", ".storage.lock"
# A folder that holds one of these is good only as a whole, so it is put in place as a whole.
# The first is `torchrec_pt.checkpoint.MARK`, which takes torch to load.
_WHOLE = frozenset({"complete.json", MANIFEST_NAME})

Index = Mapping[str, "StoredFile"]  # path inside run_dir -> what it holds


class ChangedError(Exception):
    """What is being copied is not, or no more, what it was said to be."""


@dataclass(frozen=True)
class StoredFile:
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class _Seen:
    """A local file whose digest we know as long as it looks like this."""

    num_bytes: int
    mtime_ns: int
    sha256: str


class RunFiles:
    """The files of a run_dir; a context manager that one process of this node holds at a time.

    What is in step with the storage stands in a hidden file of run_dir, so that it is not read
    again, and so that what others removed from the storage is told from what was never left.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._in_step: dict[str, _Seen] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFiles:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = (self.run_dir / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            record = json.loads((self.run_dir / _RECORD).read_text())
            self._in_step = {path: _Seen(**seen) for path, seen in record.items()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._lock is not None
        try:
            record = {path: asdict(seen) for path, seen in sorted(self._in_step.items())}
            write_json(self.run_dir / _RECORD, record)
        finally:
            self._lock.close()

    def stages(self, folders: Sequence[str] | None) -> list[str]:
        """Those that have files here."""
        stages = {stage_of(path) for path in self._paths()}
        return sorted(stage for stage in stages if is_asked_for(stage, folders))

    def describe(self, stage: str) -> dict[str, StoredFile]:
        """What the stage holds now.

        Raises:
            FileNotFoundError: a file vanished meanwhile.
        """
        found = {path: self._look(path) for path in self._paths() if stage_of(path) == stage}
        return {path: StoredFile(seen.num_bytes, seen.sha256) for path, seen in found.items()}

    def remember(self, stage: str, index: Index) -> None:
        """The stage is in step with the storage, which holds `index` of it."""
        for path in [path for path in self._in_step if stage_of(path) == stage]:
            if path not in index:
                del self._in_step[path]
        for path, file in index.items():
            with contextlib.suppress(FileNotFoundError):  # of a checkpoint pruned just now
                seen = self._look(path)
                if seen.sha256 == file.sha256:
                    self._in_step[path] = seen

    def take(
        self, stage: str, index: Index, blocks: Callable[[str, StoredFile], Iterable[bytes]]
    ) -> None:
        """Bring the stage to `index`; files that were never in step stay.

        Args:
            blocks: the content of a file.
        Raises:
            WriteError, DataError: no space, no permission.
            ChangedError: the blocks are not what the index says.
        """
        self._remove_gone(stage, index)
        # result.json says that what stands in the folders beside it is complete.
        for folder in sorted({str(PurePosixPath(path).parent) for path in index}, reverse=True):
            inside = [path for path in index if str(PurePosixPath(path).parent) == folder]
            names = {PurePosixPath(path).name for path in inside}
            stale = [path for path in inside if not self._is_here(path, index[path])]
            if names & _WHOLE:
                here = self.run_dir / folder
                if stale or {path.name for path in here.iterdir()} != names:
                    with whole_or_nothing(here) as partial:
                        for path in inside:
                            with (partial / Path(path).name).open("wb") as target:
                                _copy(blocks(path, index[path]), index[path], target)
            else:
                for path in sorted(stale, key=lambda path: Path(path).name == "result.json"):
                    with whole_file(self.run_dir / path) as partial, partial.open("wb") as target:
                        _copy(blocks(path, index[path]), index[path], target)
        self.remember(stage, index)

    def _remove_gone(self, stage: str, index: Index) -> None:
        """Files that others removed from the storage, and that nobody changed here."""
        gone = [p for p in self._in_step if stage_of(p) == stage and p not in index]
        for path in sorted(gone, key=lambda path: Path(path).name not in _WHOLE):
            file = self.run_dir / path
            with contextlib.suppress(FileNotFoundError):
                if _stat(file) == (self._in_step[path].num_bytes, self._in_step[path].mtime_ns):
                    file.unlink()
            with contextlib.suppress(OSError):  # not empty, or not there
                file.parent.rmdir()

    def _is_here(self, path: str, file: StoredFile) -> bool:
        try:
            num_bytes, _ = _stat(self.run_dir / path)
            return num_bytes == file.num_bytes and self._look(path).sha256 == file.sha256
        except FileNotFoundError:
            return False

    def _look(self, path: str) -> _Seen:
        num_bytes, mtime_ns = _stat(self.run_dir / path)
        known = self._in_step.get(path)
        if known is not None and (known.num_bytes, known.mtime_ns) == (num_bytes, mtime_ns):
            return known
        return _Seen(num_bytes, mtime_ns, sha256(self.run_dir / path))

    def _paths(self) -> list[str]:
        found: list[str] = []
        for folder, folders, names in os.walk(self.run_dir):
            where = Path(folder).relative_to(self.run_dir)
            is_top = where == Path()
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and not (is_top and name == RAY_FOLDER)
            )
            found += [(where / name).as_posix() for name in sorted(names) if name[0] != "."]
        return found


def stage_of(path: str) -> str:
    """The stage's folder, "" for files beside them: see `torchrec_pt.runs`."""
    folders = PurePosixPath(path).parts[:-1]
    return "/".join(folders[: 3 if folders[:1] == ("finetune",) else 1])


def is_asked_for(stage: str, folders: Sequence[str] | None) -> bool:
    return folders is None or any(f"{stage}/".startswith(f"{folder}/") for folder in folders)


def blocks_of(path: Path, file: StoredFile) -> Iterator[bytes]:
    """The content of a local file.

    Raises:
        ChangedError: it is not what `file` says.
    """
    with path.open("rb") as source:
        yield from _checked(iter(lambda: source.read(BLOCK_BYTES), b""), file)


def _copy(blocks: Iterable[bytes], file: StoredFile, target: IO[bytes]) -> None:
    for block in _checked(blocks, file):
        target.write(block)


def _checked(blocks: Iterable[bytes], file: StoredFile) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
        yield block
    if digest.hexdigest() != file.sha256:
        raise ChangedError


def _stat(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
