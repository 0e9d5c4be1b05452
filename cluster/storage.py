"""Where a run is kept besides its run_dir: a folder that every node sees, or an S3 bucket.

    <storage>/<name>/storage.json                      the version of this layout
    <storage>/<name>/<stage>/index.json                path -> size and SHA-256 of a stage's files
    <storage>/<name>/<stage>/files/<sha256>-<name>     their content

An index is replaced as a whole, after the files that it names are there. So who reads sees a
stage as somebody left it, and who is killed while leaving has changed nothing. One process at a
time leaves a stage; different stages may be left from different nodes.

A stage is what `torchrec_pt.runs` gives a folder to; files beside those folders are one more.
Hidden files (work in progress) and Ray Train's own folder are not kept.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

from pyarrow import ArrowException, fs
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.job_file import NAME_PATTERN
from cluster.run_files import (
    BLOCK_BYTES,
    ChangedError,
    RunFiles,
    StoredFile,
    blocks_of,
    is_asked_for,
)
from torchrec_pt.data.errors import shown

LAYOUT_VERSION = 1
_INDEX, _FILES, _LAYOUT = "index.json", "files", "storage.json"
_CONTENT_NAME = re.compile(r"[0-9a-f]{64}-.+")
# Somebody may leave a stage while we read it, or train in it while we leave it.
_NUM_TRIES = 5


_M = TypeVar("_M", bound=BaseModel)


class StorageError(ValueError):
    """What the user can mend about --storage; the message is one line."""


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, StoredFile]


class _Layout(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int


@dataclass(frozen=True)
class Storage:
    """The place of one run.

    Attributes:
        shown: the place as messages name it.
        root: of the run, as `system` wants it.
    """

    shown: str
    system: fs.FileSystem
    root: str

    @classmethod
    def open(cls, where: str, name: str) -> Storage:
        """The place of the run `name` under `where`; writes storage.json if that is not there.

        Args:
            where: an absolute folder, or s3://bucket/prefix, to which ?endpoint_override=… and
                the other options of pyarrow's S3FileSystem may be added. Credentials come from
                the environment, as every AWS tool takes them.
        Raises:
            StorageError: a place that is malformed, absent, or that we may not write to.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise StorageError(f'--name: must match {NAME_PATTERN}, found "{shown(name)}"')
        system, path = _parse(where)
        place = where.partition("?")[0].rstrip("/")
        storage = cls(f"{place}/{name}", system, f"{path.rstrip('/')}/{name}")
        storage._claim(path)
        return storage

    def fetch(self, run_dir: Path, folders: Sequence[str] | None = None) -> None:
        """Bring stages of `run_dir` to the state in which they were left.

        Files that `run_dir` lacks or has otherwise are copied; those that were in step with the
        storage and are no more in it are removed; what was never left stays. What marks a folder
        as complete comes last. Processes of one node may call it at the same time.

        Args:
            folders: stages, or folders of stages ("finetune"); default: all there are.
        Raises:
            StorageError: the storage cannot be read.
            WriteError, DataError: run_dir cannot be written.
        """
        with RunFiles(run_dir) as files:
            for stage in self._stages(folders):
                rule = f"--storage: {self.shown}/{stage}: damaged, or changes while it is read"
                for _ in _tries(rule):
                    with contextlib.suppress(ChangedError):
                        files.take(stage, self._read_index(stage), partial(self._blocks, stage))
                        break

    def leave(self, run_dir: Path, folders: Sequence[str] | None = None) -> None:
        """Keep stages of `run_dir` as they are now; what is unchanged is not sent again.

        A stage without a file in `run_dir` stays in the storage as it is.

        Args:
            folders: stages, or folders of stages ("finetune"); default: all there are.
        Raises:
            StorageError: the storage cannot be written.
        """
        with RunFiles(run_dir) as files:
            for stage in files.stages(folders):
                for _ in _tries(f"{run_dir / stage}: changes faster than it can be kept"):
                    with contextlib.suppress(ChangedError, FileNotFoundError):
                        self._leave_stage(files, stage)
                        break

    def _leave_stage(self, files: RunFiles, stage: str) -> None:
        wanted = files.describe(stage)
        if wanted == self._read_index(stage):
            files.remember(stage, wanted)
            return
        there = self._contents(stage)
        for path, file in wanted.items():
            name = _content_name(path, file)
            if name not in there:
                content = blocks_of(files.run_dir / path, file)
                self._write(f"{self._folder(stage)}/{_FILES}/{name}", content)
                there.add(name)
        index = _Index(files=wanted).model_dump_json(indent=1).encode()
        self._write(f"{self._folder(stage)}/{_INDEX}", [index])
        files.remember(stage, wanted)
        kept = {_content_name(path, file) for path, file in wanted.items()}
        with self._talking("written"):
            for name in there - kept:
                self.system.delete_file(f"{self._folder(stage)}/{_FILES}/{name}")

    # --- what is there ----------------------------------------------------------------------

    def _claim(self, parent: str) -> None:
        """Make sure that the place is there, is of this layout, and takes what we write."""
        with self._talking("read"):
            # Of S3 only the bucket must exist.
            top = parent.partition("/")[0] if self._is_s3 else parent
            is_there = self.system.get_file_info(top).type == fs.FileType.Directory
        if not is_there:
            raise StorageError(f"--storage: {self.shown}: {top} is not there; make it first")
        ours = _Layout(version=LAYOUT_VERSION)
        found = self._read(f"{self.root}/{_LAYOUT}", _Layout)
        if found is None:
            self._write(f"{self.root}/{_LAYOUT}", [ours.model_dump_json().encode()])
        elif found != ours:
            raise StorageError(
                f"--storage: {self.shown}: is of layout version {found.version}, this is version "
                f"{LAYOUT_VERSION}; use the torchrec_pt that wrote it, or another --name"
            )

    def _stages(self, folders: Sequence[str] | None) -> list[str]:
        with self._talking("read"):
            infos = self.system.get_file_info(
                fs.FileSelector(self.root, allow_not_found=True, recursive=True)
            )
        stages = [
            info.path[len(self.root) :].rpartition("/")[0].strip("/")
            for info in infos
            if info.type == fs.FileType.File and info.base_name == _INDEX
        ]
        return sorted(stage for stage in stages if is_asked_for(stage, folders))

    def _read_index(self, stage: str) -> dict[str, StoredFile]:
        index = self._read(f"{self._folder(stage)}/{_INDEX}", _Index)
        if index is None:
            return {}
        for path in index.files:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise StorageError(
                    f'--storage: {self.shown}/{stage}: names "{shown(path)}", which is no file of '
                    "a run; use another --name"
                )
        return index.files

    def _contents(self, stage: str) -> set[str]:
        selector = fs.FileSelector(f"{self._folder(stage)}/{_FILES}", allow_not_found=True)
        with self._talking("read"):
            names = {info.base_name for info in self.system.get_file_info(selector)}
        return {name for name in names if _CONTENT_NAME.fullmatch(name)}

    def _folder(self, stage: str) -> str:
        return f"{self.root}/{stage}" if stage else self.root

    # --- talking to the file system ---------------------------------------------------------

    def _blocks(self, stage: str, path: str, file: StoredFile) -> Iterator[bytes]:
        source = f"{self._folder(stage)}/{_FILES}/{_content_name(path, file)}"
        try:
            with self._talking("read"), self.system.open_input_stream(source) as stream:
                while block := stream.read(BLOCK_BYTES):
                    yield block
        except FileNotFoundError:  # left anew, and this content went away
            raise ChangedError from None

    def _read(self, path: str, model: type[_M]) -> _M | None:
        try:
            with self._talking("read"), self.system.open_input_stream(path) as stream:
                return model.model_validate_json(stream.read())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise StorageError(
                f"--storage: {self.shown}: {path} is not ours; use another --name"
            ) from None

    def _write(self, path: str, blocks: Iterable[bytes]) -> None:
        """A file that is there as a whole or not at all."""
        with self._talking("written"):
            target = path
            if not self._is_s3:  # where a key has no content before all of it has come
                folder, _, name = path.rpartition("/")
                self.system.create_dir(folder)
                target = f"{folder}/.{name}.{os.getpid()}.partial"
            try:
                with self.system.open_output_stream(target) as stream:
                    for block in blocks:
                        stream.write(block)
            except BaseException:
                # Leaving the block has completed what came so far.
                with contextlib.suppress(OSError, ArrowException):
                    self.system.delete_file(target)
                raise
            if target != path:
                self.system.move(target, path)

    @property
    def _is_s3(self) -> bool:
        return isinstance(self.system, fs.S3FileSystem)

    @contextlib.contextmanager
    def _talking(self, done: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            raise StorageError(
                f"--storage: {self.shown}: cannot be {done}, {_reason(error)}; check the place, "
                "the credentials in the environment and the network"
            ) from None


def _parse(where: str) -> tuple[fs.FileSystem, str]:
    """The file system, and the place as that wants it."""
    place = where.partition("?")[0]
    try:
        parts = urlsplit(where)
    except ValueError as error:
        raise StorageError(f'--storage: "{shown(place)}" is no URI, {error}; mend it') from None
    if parts.username is not None or parts.password is not None or "_key=" in parts.query:
        raise StorageError(
            "--storage: a URI with credentials would stand in logs; give them in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    if parts.scheme not in ("s3", "file") and not where.startswith("/"):
        raise StorageError(
            f'--storage: must be an absolute folder or s3://bucket/prefix, found "{shown(place)}"'
        )
    if parts.scheme == "s3" and not parts.netloc:
        raise StorageError(f'--storage: "{shown(place)}" names no bucket; give s3://bucket/prefix')
    try:
        system, path = fs.FileSystem.from_uri(where)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"--storage: {shown(place)}: cannot be opened, {_reason(error)}; check the URI"
        ) from None
    return system, path


def _content_name(path: str, file: StoredFile) -> str:
    return f"{file.sha256}-{PurePosixPath(path).name}"


def _reason(error: BaseException) -> str:
    """What the file system says, in a line; of S3 without the keys and its hints."""
    text = " ".join(str(error).split())
    _, aws, reason = text.partition("AWS Error ")
    return shown(reason if aws else text, 300).rstrip(".")


def _tries(rule: str) -> Iterator[None]:
    """Times to try; the loop that needs more of them than there are has failed."""
    for _ in range(_NUM_TRIES):
        yield
    raise StorageError(f"{rule}; run the same command again")
