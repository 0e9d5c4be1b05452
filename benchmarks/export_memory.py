"""Peak memory of bench_export.py's Parquet export, in a process of its own.

Of the export of a loaded model: what grows beyond the model. Of the whole way from the run's
folder, which verifies and loads the checkpoint: what grows beyond the libraries, the table in it.
"""

from __future__ import annotations

from pathlib import Path

from peak_memory import Peak, answer, ask, measure_peak
from torch import Tensor

from torchrec_pt.config import IndexConfig
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.export import export_embeddings
from torchrec_pt.export.embeddings import Asked, write_embeddings
from torchrec_pt.served import load_served


def peak_memory(what: str, run_dir: Path, small_run_dir: Path) -> Peak:
    """Measured by this file, run as a program.

    Args:
        what: "loaded" or "whole".
        small_run_dir: a run that the code is loaded with.
    """
    return ask(__file__, what, run_dir, small_run_dir)


def _measure(what: str, run_dir: str, small_run_dir: str) -> Peak:
    with joined_ranks() as ranks:
        export_embeddings(small_run_dir, "items")
        if what == "whole":

            def whole() -> list[Tensor]:
                export_embeddings(run_dir, "items")
                return []

            return measure_peak(whole, [], "cpu")
        served = load_served(Path(run_dir), ranks)
        asked = Asked("items", "parquet", "float32", IndexConfig(), None, None)

        def loaded() -> list[Tensor]:
            write_embeddings(served, asked)
            return []

        return measure_peak(loaded, [], "cpu")


if __name__ == "__main__":
    answer(_measure)
