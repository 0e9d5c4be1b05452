"""Checkpoints: safetensors shards by torch.distributed.checkpoint, everything else JSON.

    <folder>/step-00000120/
        shard-*.safetensors   tensors, each rank its part; no pickle anywhere
        state.json            position, metrics, configuration
        complete.json         SHA-256 of every file; written last

A checkpoint is written beside its place and renamed, so a folder that bears the
right name is whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from torchrec_pt.distributed import Ranks, raised_together
from torchrec_pt.files import cannot_write, fsync, sha256


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message is one line."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], ranks: Ranks
) -> Path:
    """Write <folder>/step-<step>; all ranks call it.

    Args:
        tensors: plain tensors (alike on all ranks) and ShardedTensors.
        state: what JSON can hold.
    Raises:
        CheckpointError: a full disk and the like, on every rank; nothing is left of it.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".step-{step:08d}.partial"
    # A 0-dim tensor has no slices to be read by.
    flat = {name: t.reshape(1) if t.dim() == 0 else t for name, t in tensors.items()}
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    try:
        with raised_together():
            if ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with _first_cause():
            dcp.save(flat, storage_writer=writer)
        with raised_together():
            if ranks.is_first:
                _complete(partial, state)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                fsync(folder)
    except OSError as error:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(cannot_write(final, error)) from None
    return final


def _complete(partial: Path, state: Mapping[str, Any]) -> None:
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    hashes = {path.name: sha256(path) for path in sorted(partial.iterdir())}
    (partial / "complete.json").write_text(json.dumps(hashes, indent=1))
    for path in partial.iterdir():
        fsync(path)


@contextlib.contextmanager
def _first_cause() -> Iterator[None]:
    """What failed on one rank, alike on all, in place of every rank's traceback."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def load(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read the named tensors in place, whatever the ranks and the sharding that saved them.

    Raises:
        CheckpointError: damaged, or a tensor that it lacks or holds in another shape.
    """
    verify(path)
    held = shapes(path)
    flat = {name: t.reshape(1) if t.dim() == 0 else t for name, t in tensors.items()}
    for name, tensor in flat.items():
        if name not in held:
            raise CheckpointError(f'{path}: holds no tensor "{name}"; it is of another model')
        if held[name] != tuple(tensor.size()):
            raise CheckpointError(
                f'{path}: "{name}" is {held[name]}, the model wants {tuple(tensor.size())}; '
                "use the configuration it was trained with"
            )
    with _first_cause():
        dcp.load(dict(flat), storage_reader=HuggingFaceStorageReader(str(path)))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint."""
    metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: tuple(value.size) for name, value in metadata.items()}  # type: ignore[union-attr]


def load_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    verify(path)
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def verify(path: Path) -> None:
    """Check every file against its hash.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    try:
        hashes: dict[str, str] = json.loads((path / "complete.json").read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: no complete checkpoint; use another one") from None
    for name, expected in hashes.items():
        if not (path / name).is_file() or sha256(path / name) != expected:
            raise CheckpointError(f"{path / name}: damaged or missing; use another checkpoint")


def saved(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def prune(folder: Path, keep_last: int, best: Path) -> None:
    """Delete all but the newest `keep_last` and the best; the first rank alone calls it."""
    for path in saved(folder)[:-keep_last]:
        if path != best:
            shutil.rmtree(path)
