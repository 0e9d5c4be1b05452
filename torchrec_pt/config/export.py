"""What a run exports, and how: the [export] section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from torchrec_pt.config.section import Section

What = Literal["items", "users"]
Format = Literal["parquet", "npy", "safetensors", "faiss", "csv", "jsonl"]
Dtype = Literal["float32", "float16", "bfloat16", "int8"]

# Arrow and NumPy have no bfloat16; an index has codes of its own; text gains nothing by rounding.
DTYPES: dict[Format, tuple[Dtype, ...]] = {
    "parquet": ("float32", "float16", "int8"),
    "npy": ("float32", "float16", "int8"),
    "safetensors": ("float32", "float16", "bfloat16", "int8"),
    "faiss": ("float32",),
    "csv": ("float32",),
    "jsonl": ("float32",),
}


# Of an index: what there is to choose of each kind.
OPTIONS: dict[str, tuple[str, ...]] = {
    "flat": (),
    "ivf": ("num_lists", "num_probes"),
    "hnsw": ("num_links", "ef_construction", "ef_search"),
    "pq": ("num_parts", "bits"),
}


def check_dtype(format: Format, dtype: Dtype) -> None:
    """
    Raises:
        ValueError: no such format, or one that does not hold such numbers.
    """
    if format not in DTYPES:
        raise ValueError(f'format: unknown "{format}"; use one of {", ".join(DTYPES)}')
    if dtype not in DTYPES[format]:
        holds = " or ".join(DTYPES[format])
        advice = f"{holds}, or the format safetensors"
        if format == "faiss":
            advice = 'float32, and index.kind = "pq" for a small index'
        raise ValueError(f'dtype: {format} holds {holds}, given "{dtype}"; use {advice}')


class IndexConfig(Section):
    """A FAISS index: exact (flat), or one that trades recall for time (ivf, hnsw) or space (pq).

    Cosine is the inner product of vectors of length 1: the index holds them so, and whoever asks
    it brings queries of length 1.
    """

    kind: Literal["flat", "ivf", "hnsw", "pq"] = "flat"
    metric: Literal["inner_product", "cosine"] = "inner_product"
    num_lists: int | None = Field(
        None, ge=1, description="of ivf; default: 4 √N, but 39 vectors a list at least"
    )
    num_probes: int = Field(16, ge=1, description="of ivf: lists that a search reads")
    num_links: int = Field(32, ge=2, description="of hnsw: neighbours of a vector in the graph")
    ef_construction: int = Field(80, ge=1, description="of hnsw: candidates while it is built")
    ef_search: int = Field(64, ge=1, description="of hnsw: candidates of a search")
    num_parts: int | None = Field(
        None, ge=1, description="of pq: parts of a vector, a code each; default: dim / 4"
    )
    bits: int = Field(8, ge=4, le=12, description="of pq: of a code")

    @model_validator(mode="after")
    def _has_options_of_its_kind(self) -> IndexConfig:
        for kind, keys in OPTIONS.items():
            for key in keys:
                is_changed = getattr(self, key) != type(self).model_fields[key].default
                if is_changed and kind != self.kind:
                    raise ValueError(
                        f'{key} is of an index of kind "{kind}", this one is "{self.kind}"; '
                        "drop it, or change kind"
                    )
        return self


class ExportConfig(Section):
    what: tuple[What, ...] = ("items", "users")
    formats: tuple[Format, ...] = Field(("parquet",), min_length=1)
    dtype: Dtype = Field("float32", description="int8: codes, and a float32 scale a row")
    index: IndexConfig = IndexConfig()
    ids: Path | None = Field(
        None, description="text file of external ids, one a line; default: all of them"
    )
    out: Path | None = Field(None, description="a folder; default: <run_dir>/export")

    @model_validator(mode="after")
    def _goes_together(self) -> ExportConfig:
        for format in self.formats:
            check_dtype(format, self.dtype)
        if self.ids is not None and len(self.what) != 1:
            raise ValueError('ids are of items or of users; set what to ["items"] or ["users"]')
        return self
