"""Files of vectors and their ids, written as the blocks come.

    parquet       columns id, of int8 scale, and embedding, a list of dim numbers
    npy           (N, dim), little-endian; <what>_ids.npy, and of int8 <what>_scales.npy (N,)
    safetensors   embeddings (N, dim), of int8 scales (N,), and ids (N,) int64
    csv           columns id, e0, e1, …
    jsonl         {"id": …, "embedding": […]} a line

Ids that are strings stand beside a safetensors file in <file>.ids.parquet. faiss is in
`faiss_index`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from torchrec_pt.checkpoint import rows_per_block
from torchrec_pt.config.export import Dtype, Format
from torchrec_pt.export.rounding import Rounded
from torchrec_pt.files import whole_file
from torchrec_pt.safetensors_file import Entry, write_safetensors


@dataclass(frozen=True, eq=False)
class Vectors:
    """What there is to write: N ids, and N rows in blocks that can be read once, on the CPU."""

    ids: pl.Series
    dim: int
    dtype: Dtype
    blocks: Iterable[Rounded]

    def with_ids(self) -> Iterator[tuple[pl.Series, Rounded]]:
        """Each block and its ids."""
        begin = 0
        for block in self.blocks:
            yield self.ids.slice(begin, len(block.values)), block
            begin += len(block.values)


class Files:
    """The files of one export, in one folder; they take their names together.

    Attributes:
        path: of the main one.
        partial: name -> where it lies until the block of `together` ends.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path = path
        self.partial: dict[str, Path] = {}
        self._stack = stack

    @classmethod
    @contextlib.contextmanager
    def together(cls, path: Path) -> Iterator[Files]:
        with contextlib.ExitStack() as stack:
            yield cls(path, stack)

    def new(self, name: str | None = None) -> Path:
        """A file to write; by default the main one."""
        name = name or self.path.name
        self.partial[name] = self._stack.enter_context(whole_file(self.path.with_name(name)))
        return self.partial[name]


# --- Parquet ------------------------------------------------------------------------------------

_ARROW_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}


def write_parquet(vectors: Vectors, files: Files) -> None:
    """Row groups of BLOCK_BYTES of float32, snappy; no dictionaries, since hardly a value repeats.

    float16 is Arrow's halffloat.
    """
    ids = vectors.ids.to_arrow()
    fields = [("id", ids.type), ("embedding", pa.list_(_ARROW_TYPES[vectors.dtype], vectors.dim))]
    if vectors.dtype == "int8":
        fields.insert(1, ("scale", pa.float32()))
    schema = pa.schema(fields)
    with pq.ParquetWriter(files.new(), schema, use_dictionary=False) as writer:
        for group in _row_groups(ids, vectors, schema):
            writer.write_table(group, row_group_size=max(1, group.num_rows))


def _row_groups(ids: pa.Array, vectors: Vectors, schema: pa.Schema) -> Iterator[pa.Table]:
    enough = rows_per_block((vectors.dim,), torch.float32)
    held: list[pa.Table] = []
    num_held = begin = 0
    for block in vectors.blocks:
        num = len(block.values)
        columns = [ids.slice(begin, num), _lists(block.values)]
        if block.scales is not None:
            columns.insert(1, pa.array(block.scales.numpy()))
        held.append(pa.table(columns, schema=schema))
        begin, num_held = begin + num, num_held + num
        if num_held >= enough:
            yield pa.concat_tables(held)
            held, num_held = [], 0
    if held:
        yield pa.concat_tables(held)


def _lists(values: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), values.shape[1])


def write_ids_beside(vectors: Vectors, files: Files) -> None:
    """<file>.ids.parquet: `id`, row for row; for a format that knows no strings."""
    table = pa.table({"id": vectors.ids.to_arrow()})
    pq.write_table(table, files.new(f"{files.path.name}.ids.parquet"), use_dictionary=False)


# --- NumPy --------------------------------------------------------------------------------------

_DESCRIPTIONS = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}


def write_npy(vectors: Vectors, files: Files) -> None:
    """Strings are as wide as the longest id."""
    count, stem = len(vectors.ids), files.path.stem
    is_text = vectors.ids.dtype == pl.String
    width = max(1, int(vectors.ids.str.len_chars().max() or 0)) if is_text else 0  # type: ignore[arg-type]
    id_type = f"<U{width}" if is_text else "<i8"
    scales: list[Tensor] = []
    with files.new().open("wb") as file, files.new(f"{stem}_ids.npy").open("wb") as ids_file:
        shape = (count, vectors.dim)
        np.lib.format.write_array_header_2_0(file, _header(_DESCRIPTIONS[vectors.dtype], shape))
        np.lib.format.write_array_header_1_0(ids_file, _header(id_type, (count,)))
        for ids, block in vectors.with_ids():
            file.write(block.values.numpy().data)
            ids_file.write(ids.to_numpy().astype(id_type).tobytes())
            if block.scales is not None:
                scales.append(block.scales)
    if scales:
        with files.new(f"{stem}_scales.npy").open("wb") as scales_file:
            np.save(scales_file, torch.cat(scales).numpy())


def _header(description: str, shape: tuple[int, ...]) -> dict[str, object]:
    return {"descr": description, "fortran_order": False, "shape": shape}


# --- safetensors --------------------------------------------------------------------------------


def write_safetensors_file(vectors: Vectors, files: Files) -> None:
    count, scales = len(vectors.ids), list[Tensor]()

    def values() -> Iterator[Tensor]:
        for block in vectors.blocks:
            if block.scales is not None:
                scales.append(block.scales)
            yield block.values

    # Whole rows of dim numbers, a multiple of 8, so that what follows them is aligned.
    entries = [Entry("embeddings", getattr(torch, vectors.dtype), (count, vectors.dim), values)]
    if vectors.ids.dtype == pl.String:
        write_ids_beside(vectors, files)
    else:
        ids = torch.from_numpy(vectors.ids.to_numpy(writable=True))
        entries.append(Entry("ids", torch.int64, (count,), lambda: [ids]))
    if vectors.dtype == "int8":
        entries.append(Entry("scales", torch.float32, (count,), lambda: scales))
    about = {"format": "pt", "dtype": vectors.dtype, "count": str(count), "dim": str(vectors.dim)}
    write_safetensors(files.new(), entries, about, in_order=True)


# --- text ---------------------------------------------------------------------------------------


def write_csv(vectors: Vectors, files: Files) -> None:
    names = [f"e{place}" for place in range(vectors.dim)]
    with files.new().open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(["id", *names]) + "\n")
        for ids, block in vectors.with_ids():
            table = pl.from_numpy(block.values.numpy(), schema=names)
            table.insert_column(0, ids.alias("id"))
            file.write(table.write_csv(include_header=False))


def write_jsonl(vectors: Vectors, files: Files) -> None:
    with files.new().open("w", encoding="utf-8", newline="") as file:
        for ids, block in vectors.with_ids():
            table = pl.DataFrame({"id": ids, "embedding": block.values.numpy()})
            file.write(table.write_ndjson())


WRITERS: dict[Format, Callable[[Vectors, Files], None]] = {
    "parquet": write_parquet,
    "npy": write_npy,
    "safetensors": write_safetensors_file,
    "csv": write_csv,
    "jsonl": write_jsonl,
}
