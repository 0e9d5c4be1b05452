"""Faults planted in copies of an operator's CUDA sources; its tests must notice each of them.

A mutant is compiled without optimization for speed, so that it takes seconds. Nothing of csrc is
touched: the copies' folder goes before csrc where a kernel's headers are looked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.simt import operator_library
from tests.simt.build import ROOT


@dataclass(frozen=True)
class Edit:
    """Of a file of csrc/<operator>, each place where `old` stands."""

    file: str
    old: str
    new: str


def run_tests(
    operator: str, edits: Sequence[Edit], folder: Path, *, chosen: str = ""
) -> subprocess.CompletedProcess[str]:
    """The tests of the operator with the edits made, those alone that `chosen` (-k) names."""
    copies = folder / operator
    shutil.copytree(ROOT / "csrc" / operator, copies)
    for edit in edits:
        text = (copies / edit.file).read_text()
        assert edit.old in text, f"{edit.file}: nothing to replace, {edit.old!r}"
        (copies / edit.file).write_text(text.replace(edit.old, edit.new))
    library = operator_library.build(
        operator,
        "races",
        sources=sorted(copies.glob("*.cu")),
        device_flags=["-O1", "-iquote", str(folder)],
    )
    environment = {**os.environ, "SIMT_LIBRARY": str(library)}
    tests = operator_library.tests_of(operator)
    return operator_library.run_tests(
        operator, tests, environment, "-x", "-k", chosen, timeout_s=600
    )


def assert_pass(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]


def assert_noticed(done: subprocess.CompletedProcess[str]) -> None:
    # 1: tests failed. A fault may also take the process with it (negative: by a signal).
    assert done.returncode == 1 or done.returncode < 0, done.stdout[-8000:] + done.stderr[-8000:]
