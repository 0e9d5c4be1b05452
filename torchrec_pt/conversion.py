"""A checkpoint as one plain safetensors file, which `safetensors.torch.load_file` reads.

(torch's consolidate_safetensors_files reads shards of this layout as well, but keeps the
optimizer's tensors and every dtype, and leaves the scalars as they were kept.)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from torchrec_pt.checkpoint import Checkpoint, rows_per_block
from torchrec_pt.files import whole_file
from torchrec_pt.safetensors_file import Entry, write_safetensors


def convert(
    checkpoint: Checkpoint, out: Path, *, model_only: bool = False, dtype: torch.dtype | None = None
) -> list[str]:
    """Write `out`, whole or not at all, holding a block of a tensor at a time.

    Args:
        model_only: without the optimizer's tensors, and names as the model's state_dict has them.
        dtype: of all floating-point tensors; default: as they are.
    Returns:
        Names of the tensors written.
    Raises:
        WriteError: no space, no permission.
    """
    entries = [
        _entry(checkpoint, name, dtype)
        for name in checkpoint.tensors
        if name.startswith("model.") or not model_only
    ]
    if model_only:
        entries = [dataclasses.replace(e, name=e.name.removeprefix("model.")) for e in entries]
    about = {
        "format": "pt",
        "made_by": checkpoint.made_by,
        "state": json.dumps(checkpoint.state),
    }
    with whole_file(out) as partial:
        write_safetensors(partial, entries, about)
    return [entry.name for entry in entries]


def _entry(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> Entry:
    saved = checkpoint.tensors[name]
    to = dtype if dtype is not None and saved.dtype.is_floating_point else saved.dtype
    num_rows = rows_per_block(saved.kept_shape[1:], saved.dtype)

    def blocks() -> Iterator[Tensor]:
        for begin in range(0, saved.kept_shape[0], num_rows):
            end = min(begin + num_rows, saved.kept_shape[0])
            yield checkpoint.read(name, (begin, end)).to(to)

    return Entry(name, to, saved.shape, blocks)
