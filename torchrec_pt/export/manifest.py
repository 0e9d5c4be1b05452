"""What an export says about itself: <what>.<format>.json beside the files."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchrec_pt
from torchrec_pt import checkpoint
from torchrec_pt.config.export import Dtype, Format, What
from torchrec_pt.export.rounding import Rounding
from torchrec_pt.files import sha256, write_json
from torchrec_pt.served import Served

# Package that writes, or at least reads, the files of a format.
_PACKAGES: dict[Format, str] = {
    "parquet": "pyarrow",
    "npy": "numpy",
    "safetensors": "safetensors",
    "faiss": "faiss-cpu",
    "csv": "polars",
    "jsonl": "polars",
}


@dataclass(frozen=True)
class ExportManifest:
    """
    Attributes:
        is_of_all: whether every item or user is there, in the order of dense ids; else those
            asked for, in the order of the asking.
        norms: min, mean, max and std of the vectors' lengths, before rounding.
        rounding: None of float32.
        index: of faiss alone, its kind, metric and options.
        checkpoint: path within the run and SHA-256 of its complete.json, which names the hashes
            of all its files.
        config, dataset: digest of the run's configuration, less run_dir and [export], and the
            fingerprint of the prepared data.
        files: name -> SHA-256 and bytes.
    """

    what: What
    format: Format
    dtype: Dtype
    count: int
    dim: int
    is_of_all: bool
    norms: dict[str, float]
    rounding: Rounding | None
    index: dict[str, Any] | None
    checkpoint: dict[str, str]
    config: str
    dataset: str
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))


def origin_of(served: Served) -> dict[str, Any]:
    """The fields of a manifest that say what the vectors were made of."""
    mark = served.checkpoint / checkpoint.MARK
    run_dir = served.config.run_dir
    return {
        "checkpoint": {
            "path": str(served.checkpoint.relative_to(run_dir)),
            "sha256": sha256(mark),
        },
        "config": served.config.digest(exclude=frozenset({"run_dir", "export"})),
        "dataset": served.dataset.manifest.fingerprint,
    }


def about_files(paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {
        name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in paths.items()
    }


def versions(format: Format) -> dict[str, str]:
    package = _PACKAGES[format]
    return {
        "torchrec_pt": torchrec_pt.__version__,
        "torch": torch.__version__,
        package: importlib.metadata.version(package),
    }


class NormMeter:
    """Statistics of the lengths of vectors that come in blocks."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = self._sum_of_squares = 0.0
        self._min, self._max = float("inf"), 0.0

    def add(self, vectors: Tensor) -> None:
        """(N, dim) float32."""
        if not len(vectors):
            return
        norms = vectors.norm(dim=1).double()
        self._count += len(norms)
        self._sum += float(norms.sum())
        self._sum_of_squares += float(norms.square().sum())
        self._min = min(self._min, float(norms.min()))
        self._max = max(self._max, float(norms.max()))

    def found(self) -> dict[str, float]:
        mean = self._sum / self._count
        variance = max(0.0, self._sum_of_squares / self._count - mean**2)
        return {"min": self._min, "mean": mean, "max": self._max, "std": variance**0.5}
