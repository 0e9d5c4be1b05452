"""Checkpoints: tensors in safetensors shards, everything else JSON and Parquet; no pickle anywhere.

    <folder>/step-00000120/
        shard-*.safetensors   tensors, each rank its part, with the shards' offsets in the header
        items.parquet         external_id of every item; its row is that of the item's tensors
        vocabulary.parquet    of, column, value and id of the categories of features; the id is the
                              row of the feature's tensors
        state.json            format version, what made it, position, metrics
        complete.json         SHA-256 of every file; written last

The shards are what torch.distributed.checkpoint's HuggingFaceStorageReader reads. This module
opens and loads; `saver` writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrec_pt.distributed import Ranks, raised_together
from torchrec_pt.files import sha256

FORMAT = "torchrec_pt checkpoint"
BLOCK_BYTES = 32 << 20  # of a tensor that is read in blocks of rows
VERSION = 2  # 1: without items.parquet and this number
MARK, STATE, ITEMS = "complete.json", "state.json", "items.parquet"
VOCABULARY = "vocabulary.parquet"  # none in those of before it


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message is one line."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the file that holds it."""

    file: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """A tensor of a checkpoint; one of 0 dims is kept as (1,)."""

    dtype: torch.dtype
    kept_shape: tuple[int, ...]
    is_scalar: bool
    chunks: tuple[Chunk, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.is_scalar else self.kept_shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.kept_shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One that `open` has verified.

    Attributes:
        state: what was saved beside the tensors.
        made_by: the versions and the number of ranks that wrote it.
        items: external ids, row = dense item id; Int64 or String.
        vocabulary: `of`, `column`, `value`, `id` of the categories, or None in an old checkpoint.
    """

    path: Path
    state: Mapping[str, Any]
    made_by: str
    items: pl.Series
    vocabulary: pl.DataFrame | None
    tensors: Mapping[str, Saved]

    @classmethod
    def open(cls, path: Path, ranks: Ranks) -> Checkpoint:
        """Verify every file; all ranks call it and each hashes its share.

        Raises:
            CheckpointError: incomplete, damaged or foreign; the same on every rank.
        """
        with raised_together():
            hashes = read_mark(path)
            names = sorted(hashes, key=lambda name: ((path / name).stat().st_size, name))
            for name in names[ranks.rank :: ranks.world_size]:
                if sha256(path / name) != hashes[name]:
                    raise _damaged(path / name)
        with raised_together():
            document = _read_state(path)
            items = _read_parquet(path / ITEMS, ["external_id"])["external_id"]
            vocabulary = None
            if VOCABULARY in hashes:
                vocabulary = _read_parquet(path / VOCABULARY, ["of", "column", "value", "id"])
            tensors = _read_headers(path, frozenset(document["scalars"]))
        return cls(path, document["state"], document["made_by"], items, vocabulary, tensors)

    def is_of(self, items: pl.Series) -> bool:
        """Whether these are its items, in its order."""
        return len(items) == len(self.items) and bool((as_text(items) == as_text(self.items)).all())

    def load(self, tensors: Mapping[str, Tensor], items: pl.Series) -> None:
        """Read the named tensors in place, whatever the ranks and the sharding that saved them.

        All ranks call it. Nothing is changed before everything has been checked.

        Args:
            tensors: plain tensors and ShardedTensors.
            items: external ids of the catalogue that the tensors are of.
        Raises:
            CheckpointError: another catalogue, or a tensor that the checkpoint lacks or holds in
                another shape or dtype.
        """
        if not self.is_of(items):
            raise CheckpointError(
                f"{self.path}: is of another catalogue of {len(self.items):,} items; use the data "
                "it was trained on, or start from it by pretrain.continue_from"
            )
        self.check(tensors)
        self.read_into(tensors)

    def check(
        self, tensors: Mapping[str, Tensor], num_rows: Mapping[str, int] | None = None
    ) -> None:
        """Whether each has its name, shape and dtype here.

        Args:
            num_rows: of tensors whose rows are matched: how many there should be here, whatever
                number the tensor has.
        Raises:
            CheckpointError: one that has not.
        """
        num_rows = num_rows or {}
        for name, tensor in tensors.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f'{self.path}: holds no tensor "{name}"; it is of another model'
                )
            saved, wanted = self.tensors[name], tuple(tensor.size())
            first = 1 if name in num_rows else 0
            if len(saved.shape) != len(wanted) or saved.shape[first:] != wanted[first:]:
                raise CheckpointError(
                    f'{self.path}: "{name}" is {saved.shape}, the model wants {wanted}; '
                    "use the configuration it was trained with"
                )
            if first and saved.shape[0] != num_rows[name]:
                raise CheckpointError(
                    f'{self.path}: "{name}" is {saved.shape}, its items or values are '
                    f"{num_rows[name]:,}; use another checkpoint"
                )
            if saved.dtype != tensor.dtype:
                raise CheckpointError(
                    f'{self.path}: "{name}" is {saved.dtype}, the model wants {tensor.dtype}; '
                    "use the configuration it was trained with"
                )

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Read tensors that `check` let pass, row by row as they are."""
        flat = {name: t.reshape(1) if t.dim() == 0 else t for name, t in tensors.items()}
        try:
            dcp.load(dict(flat), storage_reader=HuggingFaceStorageReader(str(self.path)))
        except CheckpointException as error:
            # What failed on one rank, alike on all, in place of every rank's traceback.
            cause, _ = next(iter(error.failures.values()))
            raise cause from None

    def read(self, name: str, *box: tuple[int, int]) -> Tensor:
        """The values of a tensor in [begin, end) of its first dimensions; of the others, all."""
        saved = self.tensors[name]
        begins = [begin for begin, _ in box] + [0] * (len(saved.kept_shape) - len(box))
        ends = [end for _, end in box] + list(saved.kept_shape[len(box) :])
        sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
        out = torch.empty(sizes, dtype=saved.dtype)
        for chunk in saved.chunks:
            here, there = [], []
            for begin, end, offset, size in zip(
                begins, ends, chunk.offsets, chunk.sizes, strict=True
            ):
                first, last = max(begin, offset), min(end, offset + size)
                here.append(slice(first - begin, last - begin))
                there.append(slice(first - offset, last - offset))
            if all(part.start < part.stop for part in here):
                with safe_open(chunk.file, framework="pt") as file:
                    out[tuple(here)] = file.get_slice(name)[tuple(there)]
        return out


def as_text(ids: pl.Series) -> pl.Series:
    """External ids so that "242" and 242 name the same item."""
    return ids.cast(pl.String)


def rows_per_block(row_shape: Sequence[int], dtype: torch.dtype) -> int:
    """How many rows of this shape come to BLOCK_BYTES, at least 1."""
    return max(1, BLOCK_BYTES // max(1, math.prod(row_shape) * dtype.itemsize))


def parts_of(tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """What this rank holds of a tensor: offsets and values, detached; a plain one is held whole."""
    if isinstance(tensor, ShardedTensor):
        return [
            (tuple(shard.metadata.shard_offsets), shard.tensor.detach())
            for shard in tensor.local_shards()
        ]
    return [((0,) * tensor.dim(), tensor.detach())]


# --- opening ------------------------------------------------------------------------------------


def read_mark(path: Path) -> dict[str, str]:
    """File -> hash, as complete.json says; the files are there, and no others.

    Raises:
        CheckpointError: incomplete, or with a file too many.
    """
    try:
        hashes = json.loads((path / MARK).read_text())
    except (OSError, ValueError):
        hashes = None
    if not isinstance(hashes, dict) or not hashes:
        raise CheckpointError(f"{path}: no complete checkpoint; use another one")
    for name in hashes:
        if name in ("", ".", "..", MARK) or Path(name).name != name:
            raise CheckpointError(
                f'{path / MARK}: names "{name}", which is no file of the checkpoint; '
                "use another checkpoint"
            )
        if not (path / name).is_file():
            raise _damaged(path / name)
    for file in sorted(path.iterdir()):
        if file.name != MARK and file.name not in hashes:
            raise CheckpointError(
                f"{file}: is no file of the checkpoint, {MARK} does not name it; remove it"
            )
    return hashes


def _damaged(file: Path) -> CheckpointError:
    return CheckpointError(f"{file}: damaged or missing; use another checkpoint")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        document: Any = json.loads((path / STATE).read_text())
    except (OSError, ValueError):
        raise _damaged(path / STATE) from None
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION or document.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is of format version {1 if version is None else version}, this is "
            f"torchrec_pt with version {VERSION}; use the torchrec_pt that wrote it, or train anew"
        )
    return document


def _read_parquet(file: Path, columns: list[str]) -> pl.DataFrame:
    try:
        return pl.read_parquet(file, glob=False, columns=columns)
    except (pl.exceptions.PolarsError, OSError):
        raise _damaged(file) from None


def _read_headers(path: Path, scalars: frozenset[str]) -> dict[str, Saved]:
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: its shards are no safetensors of this format ({reason}); "
            "use another checkpoint"
        ) from None
    chunks: dict[str, list[Chunk]] = {}
    for index, info in metadata.storage_data.items():
        chunk = Chunk(Path(info.relative_path), tuple(index.offset), tuple(info.shape))
        chunks.setdefault(index.fqn, []).append(chunk)
    tensors: dict[str, Saved] = {}
    for name, about in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(about, TensorStorageMetadata)
        boxes = tuple(sorted(chunks[name], key=lambda chunk: chunk.offsets))
        saved = Saved(about.properties.dtype, tuple(about.size), name in scalars, boxes)
        if sum(math.prod(box.sizes) for box in boxes) != math.prod(saved.kept_shape):
            raise CheckpointError(f'{path}: holds "{name}" in part only; use another checkpoint')
        tensors[name] = saved
    return tensors


# --- folders of checkpoints ---------------------------------------------------------------------


def folder_of_step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def saved(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def prune(folder: Path, keep_last: int, best: Path) -> None:
    """Delete all but the newest `keep_last` and the best; the first rank alone calls it."""
    for path in saved(folder)[:-keep_last]:
        if path != best:
            remove(path)


def move(source: Path, target: Path) -> Path:
    """Rename a folder, into the place of `target` or beside what is there; where it is now."""
    place, num = target, 1
    while place.exists():
        num += 1
        place = target.with_name(f"{target.name}-{num}")
    place.parent.mkdir(exist_ok=True)
    return source.rename(place)


def remove(path: Path) -> None:
    """Delete a checkpoint so that a kill leaves it whole, or only what the next save deletes."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed.partial")))


def leftovers(folder: Path) -> Iterator[Path]:
    """What interrupted saves and deletions left behind."""
    return folder.glob(".step-*.partial")
