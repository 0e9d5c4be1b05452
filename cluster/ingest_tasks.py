"""What the tasks of `ingest` do to blocks of the raw log; the rest is the library's passes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from torchrec_pt.data.partition_files import Scratch, read_blocks, write_block


@dataclass(frozen=True)
class Reading:
    """Reads files of the log in blocks.

    Attributes:
        path, sources: of the configuration, for messages.
        working_dir: relative paths are taken from here; None where there are none.
    """

    path: Path
    sources: tuple[Path, ...]
    working_dir: Path | None
    rows_per_block: int

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Args:
        batch: `file`, pickled lazy frames of `RawData.files`.
        """
        if self.working_dir is not None:
            os.chdir(self.working_dir)
        files = map(pickle.loads, batch["file"].to_pylist())
        for block in read_blocks(files, self.path, self.sources, self.rows_per_block):
            # Ray Data knows no string views.
            yield block.to_arrow(compat_level=pl.CompatLevel.oldest())


@dataclass(frozen=True)
class Routing:
    """Deals the rows of a block to the partitions of their users."""

    scratch: Scratch

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The file that was written, `first_row` names it, or none where there are no rows."""
        if not batch.num_rows:
            return pa.table({"first_row": pa.array([], pa.int64())})
        return pa.table({"first_row": [write_block(self.scratch, pl.DataFrame(batch))]})
