"""Safetensors files, written block by block and hashed on the way.

8 bytes: length of the header; the header, JSON: name -> dtype, shape, place of the bytes; the
bytes, without gaps. (safetensors' own writer wants every tensor of a file in memory, twice.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        blocks: its values in C order, cut anywhere; on any device.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    *,
    in_order: bool = False,
) -> str:
    """Write a file, and have the disk hold it; never more than one block is copied.

    Args:
        entries: names are unique.
        in_order: as they are given; then each begins at a multiple of its own item size all the
            same. By default they go from wide to narrow, which sees to that.
    Returns:
        Hexadecimal SHA-256 of the file.
    """
    ordered = list(entries)
    if not in_order:
        ordered.sort(key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in ordered:
        begin, end = end, end + entry.num_bytes
        assert begin % entry.dtype.itemsize == 0, entry.name
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            num_bytes = 0
            for block in entry.blocks():
                flat = block.detach().cpu().contiguous().flatten().view(torch.uint8)
                write(flat.numpy().data)
                num_bytes += flat.numel()
            assert num_bytes == entry.num_bytes, entry.name
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
