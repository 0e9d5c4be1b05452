"""Writing checkpoints, on a thread of its own while training goes on.

A checkpoint is written beside its place and renamed, so a folder that bears the right name is
whole. The layout is `checkpoint`'s. Every rank writes its shards; tensors that all ranks hold
are dealt among them. (torch's HuggingFaceStorageWriter keeps one shard of a tensor in a file, the
last; column_wise gives a rank several.)
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import polars as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

import torchrec_pt
from torchrec_pt import checkpoint
from torchrec_pt.checkpoint import (
    FORMAT,
    ITEMS,
    MARK,
    STATE,
    VERSION,
    VOCABULARY,
    CheckpointError,
    parts_of,
)
from torchrec_pt.distributed import Ranks, gather_objects, raised_together
from torchrec_pt.files import cannot_write, fsync, sha256
from torchrec_pt.safetensors_file import Entry, write_safetensors


@dataclass(frozen=True)
class _Part:
    """What one rank writes of a tensor."""

    name: str
    offsets: tuple[int, ...]
    values: Tensor

    def entry(self) -> Entry:
        values = self.values
        return Entry(self.name, values.dtype, tuple(values.shape), lambda: [values])


class Saver:
    """Writes the checkpoints of a stage into one folder; all ranks make it and call it alike.

    A context manager: leaving it waits for what is being written. At most one save is under way,
    and what made it fail is raised by the next `save`, by `wait`, or on leaving, the same error
    on every rank. Its ranks talk in a gloo group of its own, beside the training's collectives.

    Args:
        items: external ids, row = dense item id.
        vocabulary: of the categories of features, as `Checkpoint` holds it; None for none.
        keep_last: so many newest checkpoints stay, and the best one.
        in_background: `save` returns once the tensors are copied to memory of the CPU.
    """

    def __init__(
        self,
        folder: Path,
        items: pl.Series,
        ranks: Ranks,
        *,
        keep_last: int,
        in_background: bool,
        vocabulary: pl.DataFrame | None = None,
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.keep_last = keep_last
        self.in_background = in_background
        self._tables = {ITEMS: pl.DataFrame({"external_id": items})}
        if vocabulary is not None:
            self._tables[VOCABULARY] = vocabulary
        self._table_hashes: dict[str, str] = {}
        self._newest: Path | None = None  # of those that this object wrote
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Saver:
        self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """An error of the block goes before one of the save that it interrupted."""
        try:
            if self._thread is not None:
                self._thread.join()
            if error is None:
                self.wait()
        finally:
            group, self._group = self._group, None
            dist.destroy_process_group(group)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, best_step: int
    ) -> None:
        """Write <folder>/step-<step>, then delete what is neither new nor the best.

        Args:
            tensors: plain tensors (alike on all ranks) and ShardedTensors; they may change after.
            state: what JSON can hold; left alone after.
            best_step: the checkpoint to keep besides the newest.
        Raises:
            CheckpointError: a full disk and the like; nothing is left of the save.
        """
        self.wait()
        parts, scalars = self._my_parts(tensors), _scalars(tensors)
        if self.in_background:
            parts = [_Part(p.name, p.offsets, p.values.to("cpu", copy=True)) for p in parts]
        document = {
            "format": FORMAT,
            "version": VERSION,
            "made_by": f"torchrec_pt {torchrec_pt.__version__}, torch {torch.__version__}, "
            f"world size {self.ranks.world_size}",
            "scalars": scalars,
            "state": state,
        }
        # As text: the caller's lists may grow meanwhile.
        text = json.dumps(document, indent=1)
        if not self.in_background:
            self._write(step, parts, text, best_step)
            return
        self._thread = threading.Thread(
            target=self._write_or_note, args=(step, parts, text, best_step), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: what was being written could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_or_note(self, step: int, parts: list[_Part], text: str, best_step: int) -> None:
        try:
            self._write(step, parts, text, best_step)
        except BaseException as error:
            self._failure = error

    def _my_parts(self, tensors: Mapping[str, Tensor]) -> list[_Part]:
        """Own shards, and of the tensors that all ranks hold a share, about as many bytes each."""
        mine: list[_Part] = []
        dealt_bytes = [0] * self.ranks.world_size
        for name, tensor in tensors.items():
            if not isinstance(tensor, ShardedTensor):
                rank = dealt_bytes.index(min(dealt_bytes))
                dealt_bytes[rank] += tensor.nbytes
                if rank != self.ranks.rank:
                    continue
            for offsets, values in parts_of(tensor):
                if values.dim() == 0:  # has no slices to be read by
                    offsets, values = (0,), values.reshape(1)
                if values.numel() or not isinstance(tensor, ShardedTensor):
                    mine.append(_Part(name, offsets, values))
        return mine

    # --- on the thread ----------------------------------------------------------------------

    def _write(self, step: int, parts: list[_Part], text: str, best_step: int) -> None:
        final = checkpoint.folder_of_step(self.folder, step)
        partial = self.folder / f".{final.name}.partial"
        try:
            with raised_together(self._group):
                if self.ranks.is_first:
                    for leftover in checkpoint.leftovers(self.folder):
                        shutil.rmtree(leftover)
                    partial.mkdir(parents=True)
            hashes: dict[str, str] = {}
            with raised_together(self._group):
                hashes = self._write_shards(partial, parts)
            for others in gather_objects(hashes, self._group):
                hashes |= others
            with raised_together(self._group):
                if self.ranks.is_first:
                    self._complete(partial, text, hashes)
                    checkpoint.remove(final)
                    partial.rename(final)
                    fsync(self.folder)
                    self._newest = final
                    best = checkpoint.folder_of_step(self.folder, best_step)
                    checkpoint.prune(self.folder, self.keep_last, best)
        except OSError as error:
            if self.ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(cannot_write(final, error)) from None

    def _write_shards(self, partial: Path, parts: list[_Part]) -> dict[str, str]:
        """Files of this rank, each name once in a file; their hashes."""
        files: list[dict[str, _Part]] = []
        for part in parts:
            file = next((file for file in files if part.name not in file), None)
            if file is None:
                file = {}
                files.append(file)
            file[part.name] = part
        hashes: dict[str, str] = {}
        for index, file in enumerate(files):
            offsets = {name: {"saved_offsets": part.offsets} for name, part in file.items()}
            name = f"shard-{self.ranks.rank:05d}-{index:05d}.safetensors"
            hashes[name] = write_safetensors(
                partial / name,
                [part.entry() for part in file.values()],
                {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"},
            )
        return hashes

    def _complete(self, partial: Path, text: str, hashes: dict[str, str]) -> None:
        (partial / STATE).write_text(text)
        for name in self._tables:
            self._put_table(partial / name)
        hashes = {**hashes, STATE: sha256(partial / STATE), **self._table_hashes}
        (partial / MARK).write_text(json.dumps(hashes, indent=1, sort_keys=True))
        for name in (STATE, *self._tables, MARK):
            fsync(partial / name)
        fsync(partial)

    def _put_table(self, path: Path) -> None:
        """Written once; later checkpoints share the file where the disk can do that."""
        if self._newest is None:
            self._tables[path.name].write_parquet(path, use_pyarrow=True)
            self._table_hashes[path.name] = sha256(path)
            return
        try:
            os.link(self._newest / path.name, path)
        except OSError:
            shutil.copyfile(self._newest / path.name, path)


def _scalars(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.dim() == 0]
