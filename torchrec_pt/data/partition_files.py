"""Rows that wait on the disk between two passes of preparation, cut into partitions by user.

A file holds batches of rows, of which any can be read without the others. Arrow's own format:
these files are read back soon, once or twice, and then go away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_pt.data.errors import reading
from torchrec_pt.data.parts import cut
from torchrec_pt.files import WriteError, cannot_write


@dataclass(frozen=True)
class Scratch:
    """Attributes:
    folder: absolute.
    """

    folder: Path
    num_partitions: int

    def of(self, pass_name: str, partition: int) -> Path:
        return self.folder / pass_name / f"{partition}.arrow"

    @property
    def alive(self) -> Path:
        return self.folder / "alive.arrow"

    def dense(self, of: str) -> Path:
        return self.folder / f"dense_{of}s.arrow"


def read_blocks(
    files: Iterable[pl.LazyFrame], path: Path, sources: Sequence[Path], rows_per_block: int
) -> Iterator[pl.DataFrame]:
    """The rows of files of a log, one after the other; no block is empty.

    Args:
        path, sources: of the configuration, for messages.
    Raises:
        DataError: a file that cannot be read.
    """
    with reading(path, sources):
        for file in files:
            blocks = file.collect_batches(
                chunk_size=rows_per_block, maintain_order=True, engine="streaming"
            )
            yield from (block for block in blocks if block.height)


def write_block(scratch: Scratch, block: pl.DataFrame) -> int:
    """Deal the rows of a block to the partitions of their users; its first row names its file."""
    first_row = int(block["row"].min())  # type: ignore[arg-type]
    write_partitions(scratch.of("blocks", first_row), block, "user", scratch)
    return first_row


def write_partitions(path: Path, rows: pl.DataFrame, user: str, scratch: Scratch) -> None:
    """Rows by the partition of the column `user`, one batch for each partition."""
    num = scratch.num_partitions
    partition = (rows[user].hash() % num).cast(pl.UInt16).to_numpy()
    order = np.argsort(partition, kind="stable")  # by radix, as there are 16 bits
    heights = np.bincount(partition, minlength=num)
    write_batches(path, cut(rows[order], heights.tolist()))


def write_batches(path: Path, batches: Iterable[pl.DataFrame]) -> None:
    """A file of at least one batch, which may be empty; once it bears its name it is whole.

    Nobody waits for the disk to hold it, as `whole_file` does: it goes away with the preparation.

    Raises:
        WriteError: instead of an OSError (no space, no permission).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            writer = None
            for batch in batches:
                table = batch.to_arrow()
                if writer is None:
                    writer = stack.enter_context(pa.ipc.new_file(partial, table.schema))
                columns = [column.combine_chunks() for column in table.columns]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=table.schema))
        partial.rename(path)
    except OSError as error:
        raise WriteError(cannot_write(path, error)) from None


def read_batches(
    path: Path, batches: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> pl.DataFrame:
    """Some of a file's batches, or all, one after the other; of some columns, or all."""
    with pa.OSFile(str(path)) as file:
        names = pa.ipc.open_file(file).schema.names
        options = pa.ipc.IpcReadOptions(
            included_fields=None if columns is None else [names.index(name) for name in columns]
        )
        reader = pa.ipc.open_file(file, options=options)
        wanted = range(reader.num_record_batches) if batches is None else batches
        table = pa.Table.from_batches([reader.get_batch(index) for index in wanted], reader.schema)
        return pl.DataFrame(pl.from_arrow(table))
