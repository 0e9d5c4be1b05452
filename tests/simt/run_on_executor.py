"""A pytest plugin: the tests of the session run the CUDA sources of operators in the executor.

    SIMT_OPERATORS=infonce SIMT_FLAVOUR=races SIMT_SEED=1 \
        pytest -p tests.simt.run_on_executor tests/ops/test_infonce.py

SIMT_OPERATORS names folders of csrc, with commas; without it, all that have kernels.
SIMT_LIBRARY names a library of theirs that is built already (mutations.py).
Tests marked `cpu_only` say something of the CPU kernels alone and are left out.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Here, so that the libraries of a sanitizer are the first that the process loads.
    from tests.simt import operator_library
    from torchrec_pt.ops import infonce

    flavour = os.environ.get("SIMT_FLAVOUR", "races")
    assert flavour in ("races", "sanitized")
    named = os.environ.get("SIMT_OPERATORS")
    operators = named.split(",") if named else operator_library.OPERATORS
    if library := os.environ.get("SIMT_LIBRARY"):
        operator_library.load(Path(library))
    else:
        for operator in operators:
            operator_library.load(operator_library.build(operator, flavour))
    if "infonce" in operators:
        # CUDA has no kernel that makes the gradients along with the loss.
        infonce._MOST_KEYS_TO_SUM = -1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("cpu_only")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
