"""Embeddings with the users' own ids, streamed to Parquet block by block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, gather_rows
from torchrec_pt.evaluate import UserEncoder
from torchrec_pt.models.transformer import Transformer

BLOCK_ROWS = 8192


def item_vectors(backbone: Transformer, ranks: Ranks) -> Iterator[Tensor]:
    """Blocks of item vectors in the order of dense ids, on every rank."""
    for begin in range(0, backbone.items.num_items, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, backbone.items.num_items)
        first, last = ranks.part_of(end - begin)
        with torch.no_grad():
            rows = backbone.items.rows(begin + first, begin + last)
            yield gather_rows(backbone.encode_items(rows))


def user_vectors(backbone: Transformer, dataset: PreparedDataset, ranks: Ranks) -> Iterator[Tensor]:
    """Blocks of user vectors in the order of dense ids, each from the user's whole history."""
    encode = UserEncoder(backbone, dataset.history("test"), ranks)
    for users in torch.arange(dataset.num_users).split(BLOCK_ROWS):
        yield encode(users)


def write_embeddings(
    path: Path, external_ids: pl.Series, blocks: Iterator[Tensor], dim: int, ranks: Ranks
) -> None:
    """Columns `id` (external) and `embedding` (list of dim float32), written aside and renamed.

    All ranks call it and make the blocks together; the first one writes.
    """
    ids = external_ids.to_arrow()
    schema = pa.schema([("id", ids.type), ("embedding", pa.list_(pa.float32(), dim))])
    partial = path.with_name(f".{path.name}.partial")
    if not ranks.is_first:
        for _ in blocks:
            pass
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            begin = 0
            for block in blocks:
                values = pa.array(block.cpu().flatten().numpy())
                vectors = pa.FixedSizeListArray.from_arrays(values, dim)
                part = ids.slice(begin, len(block))
                writer.write_table(pa.table([part, vectors], schema=schema))
                begin += len(block)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
