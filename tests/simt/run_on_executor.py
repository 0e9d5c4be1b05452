"""A pytest plugin: the tests of the session run the CUDA sources of infonce in the executor.

    SIMT_FLAVOUR=races SIMT_SEED=1 pytest -p tests.simt.run_on_executor tests/ops

SIMT_LIBRARY names a library that is built already (test_mutations.py) in the place of a flavour.
Tests marked `cpu_only` say something of the CPU kernels alone and are left out.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Here, so that the libraries of a sanitizer are the first that the process loads.
    from tests.simt import infonce_library
    from torchrec_pt.ops import infonce

    flavour = os.environ.get("SIMT_FLAVOUR", "races")
    assert flavour in ("races", "sanitized")
    library = os.environ.get("SIMT_LIBRARY")
    infonce_library.load(Path(library) if library else infonce_library.build(flavour))
    # CUDA has no kernel that makes the gradients along with the loss.
    infonce._MOST_KEYS_TO_SUM = -1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("cpu_only")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
