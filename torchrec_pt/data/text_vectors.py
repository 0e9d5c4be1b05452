"""The vectors of texts in a Parquet file of one column, a row for each user or item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_pt.data.errors import DataError
from torchrec_pt.data.text_encoder import Encode

TEXTS_AT_A_TIME = 2048
COLUMN = "vector"


class Encoded(NamedTuple):
    """Attributes:
    dim: length of a vector.
    scale: root mean square of the norms of those in training; 1 where there are none.
    """

    dim: int
    scale: float


def write_text_vectors(
    path: Path,
    texts: pl.Series,
    encode: Encode,
    *,
    heights: Sequence[int],
    num_training: int,
    where: str,
) -> Encoded | None:
    """Encode each distinct text once; a row without a text gets zeros. None: no row has one.

    In memory are the texts, one batch of vectors and one row group: the distinct vectors wait in
    a file beside `path`.

    Args:
        texts: (N,) String; one of nothing but spaces is no text.
        heights: of the row groups, which sum to N.
        num_training: the first rows, which alone make the scale.
    Raises:
        DataError: the encoder gives anything but finite vectors of one length.
    """
    distinct = texts.filter(texts.str.strip_chars().str.len_bytes() > 0).unique(maintain_order=True)
    if not len(distinct):
        return None
    scratch = path.with_suffix(".distinct")
    norms = _encode_into(scratch, distinct, encode, where)
    place = _places(texts, distinct)
    # Mapped for reading alone: writing into a map on a full disk would kill the process.
    vectors = np.memmap(scratch, np.float32, "r").reshape(len(distinct), -1)
    dim = vectors.shape[1]
    schema = pa.schema([(COLUMN, pa.list_(pa.float32(), dim))])
    with pq.ParquetWriter(path, schema, compression="NONE") as writer:  # noise does not shrink
        begin = 0
        for height in heights:
            at = place[begin : begin + height]
            block = np.where((at >= 0)[:, None], vectors[at], np.float32(0))
            rows = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dim)
            writer.write_table(pa.table([rows], schema=schema), row_group_size=max(height, 1))
            begin += height
    scratch.unlink()
    in_training = place[:num_training]
    squares = norms[in_training[in_training >= 0]] ** 2
    return Encoded(dim, float(np.sqrt(squares.mean())) if squares.any() else 1.0)


def _encode_into(
    scratch: Path, distinct: pl.Series, encode: Encode, where: str
) -> npt.NDArray[np.float64]:
    """Write the (D, dim) vectors of D texts; returns their norms (D,)."""
    norms: list[npt.NDArray[np.float64]] = []
    dim: int | None = None
    with scratch.open("wb") as file:
        for begin in range(0, len(distinct), TEXTS_AT_A_TIME):
            batch = distinct.slice(begin, TEXTS_AT_A_TIME).to_list()
            found = np.ascontiguousarray(encode(batch), dtype=np.float32)
            dim = dim or found.shape[-1]
            if found.shape != (len(batch), dim) or not np.isfinite(found).all():
                raise DataError(
                    f"{where}: the encoder must give a finite vector a text, all of one length, "
                    f"gave {found.shape} for {len(batch)} texts; choose another encoder"
                )
            file.write(found.tobytes())
            norms.append(np.linalg.norm(found.astype(np.float64), axis=1))
    return np.concatenate(norms)


def _places(texts: pl.Series, distinct: pl.Series) -> npt.NDArray[np.int64]:
    """(N,): which of the distinct ones each text is; −1 for none of them."""
    known = pl.DataFrame({"text": distinct}).with_row_index("place")
    found = pl.DataFrame({"text": texts}).join(known, on="text", how="left", maintain_order="left")
    return found["place"].cast(pl.Int64).fill_null(-1).to_numpy()
