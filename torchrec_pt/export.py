"""Embeddings with the users' own ids, streamed to Parquet or NumPy files block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, gather_each, gather_rows, joined_ranks, raised_together
from torchrec_pt.files import whole_file
from torchrec_pt.learner import Learner
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.recommender import load_served
from torchrec_pt.scoring import encode_histories, encode_item_range, head_of, own_items

BLOCK_ROWS = 8192


def export_embeddings(
    run_dir: str | Path,
    what: Literal["items", "users"],
    *,
    format: Literal["parquet", "npy"] = "parquet",
    out: str | Path | None = None,
) -> Path:
    """Write the embeddings of a finished run, in the order of dense ids; all ranks call it.

    parquet: one file with the columns `id` (external) and `embedding` (list of dim float32).
    npy: (N, dim) float32 in <what>.npy, and beside it <what>_ids.npy, (N,) int64 or unicode (all
    as wide as the longest id), row for row. Users' vectors are those after their whole history,
    with the map of a linear head in them. Files appear whole or not at all.
    Inner products of the vectors rank as the model does, but for one with an mlp head.

    Args:
        out: a folder; default <run_dir>/export.
    Returns:
        The file with the embeddings.
    Raises:
        ValueError: no finished run there.
    """
    folder = Path(out) if out is not None else Path(run_dir) / "export"
    path = folder / f"{what}.{format}"
    with joined_ranks() as ranks:
        dataset, learner = load_served(Path(run_dir), ranks)
        backbone = learner.backbone
        if what == "items":
            ids, blocks = dataset.items["external_id"], _item_vectors(backbone, ranks)
        else:
            ids, blocks = dataset.external_user_ids(), _user_vectors(learner, dataset, ranks)
        write = _write_parquet if format == "parquet" else _write_npy
        with raised_together():
            try:
                if ranks.is_first:
                    write(path, ids, blocks, backbone.dim)
            finally:
                for _ in blocks:  # made by all ranks together, written by the first
                    pass
    return path


def _item_vectors(backbone: Backbone, ranks: Ranks) -> Iterator[Tensor]:
    """Blocks of item vectors in the order of dense ids, on every rank."""
    for begin in range(0, backbone.items.num_items, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, backbone.items.num_items)
        mine = own_items(end - begin, ranks)
        yield gather_rows(encode_item_range(backbone, begin + mine.start, begin + mine.stop))


@torch.no_grad()
def _user_vectors(learner: Learner, dataset: PreparedDataset, ranks: Ranks) -> Iterator[Tensor]:
    """Blocks of user vectors in the order of dense ids, each from the user's whole history.

    A block is one part of the dataset; the ranks make theirs of consecutive parts together.
    """
    head = head_of(learner)
    history = dataset.history("test")
    users = torch.arange(dataset.num_users)
    parts = dataset.manifest.parts
    for first in range(0, len(parts), ranks.world_size):
        together = parts[first : first + ranks.world_size]
        mine = users[dataset.part_of_user == first + ranks.rank]
        vectors = []
        for begin in range(0, max(part.num_users for part in together), BLOCK_ROWS):
            some = mine[begin : begin + BLOCK_ROWS]
            rows = history.select(some).to(ranks.device)
            found = encode_histories(learner.backbone, some.to(ranks.device), rows)
            vectors.append(head.user_vectors(found))
        yield from gather_each(torch.cat(vectors))[: len(together)]


def _write_parquet(path: Path, ids: pl.Series, blocks: Iterable[Tensor], dim: int) -> None:
    column = ids.to_arrow()
    schema = pa.schema([("id", column.type), ("embedding", pa.list_(pa.float32(), dim))])
    with whole_file(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        begin = 0
        for block in blocks:
            values = pa.array(block.cpu().flatten().numpy())
            vectors = pa.FixedSizeListArray.from_arrays(values, dim)
            part = column.slice(begin, len(block))
            writer.write_table(pa.table([part, vectors], schema=schema))
            begin += len(block)


def _write_npy(path: Path, ids: pl.Series, blocks: Iterable[Tensor], dim: int) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (len(ids), dim)}
        )
        for block in blocks:
            file.write(block.cpu().numpy().astype("<f4", copy=False).tobytes())
        file.flush()
        with whole_file(path.with_name(f"{path.stem}_ids.npy")) as partial_ids:
            external = ids.to_numpy()
            with partial_ids.open("wb") as ids_file:
                np.save(ids_file, external if ids.dtype == pl.Int64 else external.astype(np.str_))
