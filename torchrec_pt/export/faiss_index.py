"""FAISS indices: <what>.faiss, which answers with external ids where these are integers.

FAISS holds an index in memory while it is built: all vectors of flat, ivf and hnsw, the codes of
pq. What trains ivf and pq is a sample spread over all vectors, which lie in a file meanwhile.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import faiss
import numpy as np
import polars as pl
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.config.export import OPTIONS, IndexConfig
from torchrec_pt.export.formats import Files, Vectors, write_ids_beside

# Vectors for each centre of k-means: FAISS warns of fewer than the first; more than the second
# make ivf's lists no better, nor pq's codes.
FEWEST_PER_CENTRE, MOST_PER_CENTRE = 39, 64
BLOCK_ROWS = 8192  # that are added at a time


def settle_index(config: IndexConfig, num: int, dim: int) -> IndexConfig:
    """With the options that were left open.

    Args:
        num: vectors of `dim` numbers.
    Raises:
        ValueError: an index that cannot be made of them.
    """
    if config.kind == "ivf":
        num_lists = config.num_lists or max(1, min(round(4 * num**0.5), num // FEWEST_PER_CENTRE))
        if num_lists > num:
            raise ValueError(
                f"export.index.num_lists: at most as many as vectors, given {num_lists:,} for "
                f"{num:,}; use fewer"
            )
        return config.model_copy(update={"num_lists": num_lists})
    if config.kind == "pq":
        num_parts = config.num_parts or dim // 4
        if dim % num_parts:
            raise ValueError(
                f"export.index.num_parts: must divide the {dim} numbers of a vector, given "
                f"{num_parts}; use {math.gcd(dim, num_parts)}"
            )
        if num < 2**config.bits:
            raise ValueError(
                f"export.index.bits: codes of {config.bits} bits need {2**config.bits:,} vectors "
                f'or more, given {num:,}; use fewer bits, or kind = "flat"'
            )
        return config.model_copy(update={"num_parts": num_parts})
    return config


def described(config: IndexConfig) -> dict[str, object]:
    """Of a settled index, what there was to choose."""
    return {key: getattr(config, key) for key in ("kind", "metric", *OPTIONS[config.kind])}


def write_faiss(vectors: Vectors, files: Files, config: IndexConfig) -> None:
    """Integers of 0 or more are the index's own ids; else ids lie in <file>.ids.parquet, by row.

    Args:
        config: settled.
    """
    path = files.new()
    index = _empty_index(config, vectors.dim)
    is_numbered = vectors.ids.dtype == pl.Int64 and bool((vectors.ids >= 0).all())
    answering = faiss.IndexIDMap2(index) if is_numbered else index
    if not is_numbered:
        write_ids_beside(vectors, files)

    def add(ids: pl.Series, rows: np.ndarray) -> None:
        if is_numbered:
            answering.add_with_ids(rows, ids.to_numpy())
        else:
            answering.add(rows)

    if index.is_trained:
        for ids, block in vectors.with_ids():
            add(ids, _compared(block.values, config))
    else:
        with tempfile.TemporaryFile(dir=path.parent) as spool:
            for block in vectors.blocks:
                spool.write(_compared(block.values, config).data)
            spool.flush()
            rows = np.memmap(spool, np.float32, "r", shape=(len(vectors.ids), vectors.dim))
            index.train(rows[_training_rows(config, len(rows))])
            for begin in range(0, len(rows), BLOCK_ROWS):
                add(vectors.ids.slice(begin, BLOCK_ROWS), rows[begin : begin + BLOCK_ROWS])
    with path.open("wb") as file:  # its own writer says a full disk in words of its own
        writer = faiss.PyCallbackIOWriter(file.write)
        faiss.write_index(answering, writer)


def _empty_index(config: IndexConfig, dim: int) -> Any:
    factory = {
        "flat": "Flat",
        "ivf": f"IVF{config.num_lists},Flat",
        "hnsw": f"HNSW{config.num_links},Flat",
        "pq": f"PQ{config.num_parts}x{config.bits}np",  # without polysemous training, minutes
    }
    index: Any = faiss.index_factory(dim, factory[config.kind], faiss.METRIC_INNER_PRODUCT)
    if config.kind == "ivf":
        index.nprobe = config.num_probes
    elif config.kind == "hnsw":
        index.hnsw.efConstruction = config.ef_construction
        index.hnsw.efSearch = config.ef_search
    elif config.kind == "pq":
        index.pq.cp.min_points_per_centroid = 1  # what is too few `settle_index` said
    return index


def _training_rows(config: IndexConfig, num: int) -> np.ndarray:
    num_centres = config.num_lists if config.kind == "ivf" else 2**config.bits
    assert num_centres is not None
    num_trained = min(num, num_centres * MOST_PER_CENTRE)
    return np.arange(num_trained) * num // num_trained


def _compared(vectors: Tensor, config: IndexConfig) -> np.ndarray:
    """(N, dim) float32 whose inner product is the metric."""
    return (F.normalize(vectors, dim=1) if config.metric == "cosine" else vectors).numpy()
