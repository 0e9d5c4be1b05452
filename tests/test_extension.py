"""Operators for sources that came without any: found, or built once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from cluster.job_file import JobFile
from cluster.packing import Code, pack
from torchrec_pt import extension


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "root/csrc").mkdir(parents=True)
    (tmp_path / "root/csrc/a.cpp").write_text("int a;")
    (tmp_path / "root/setup.py").write_text("flags = 1")
    return tmp_path / "root"


def write_operators(package: Path, text: str = "") -> Path:
    package.mkdir(parents=True, exist_ok=True)
    file = package / f"_C{EXTENSION_SUFFIXES[0]}"
    file.write_text(text)
    return file


def test_the_digest_is_of_the_operators_sources_and_of_nothing_else(root: Path) -> None:
    first = extension.digest_of(root)
    (root / "run.toml").write_text("x")
    assert extension.digest_of(root) == first
    for changed in ("setup.py", "csrc/a.cpp", "csrc/new/b.cpp"):
        before = extension.digest_of(root)
        (root / changed).parent.mkdir(exist_ok=True)
        (root / changed).write_text("changed")
        assert extension.digest_of(root) != before


def test_one_builds_while_the_others_wait(root: Path) -> None:
    builds, found = [], []

    def build(sources: Path, folder: Path) -> None:
        builds.append(sources)
        time.sleep(0.2)  # long enough for the others to come
        write_operators(folder / "torchrec_pt", "built")

    def load() -> None:
        found.append(extension.cached_operators("digest", root, build))

    threads = [threading.Thread(target=load) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [root]
    assert {file.read_text() for file in found} == {"built"}
    assert len(found) == 5


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(root: Path) -> None:
    def fails(sources: Path, folder: Path) -> None:
        write_operators(folder / "torchrec_pt", "half")
        raise ValueError("torchrec_pt: no")

    def works(sources: Path, folder: Path) -> None:
        write_operators(folder / "torchrec_pt", "whole")

    with pytest.raises(ValueError, match="no"):
        extension.cached_operators("digest", root, fails)
    assert extension.cached_operators("digest", root, works).read_text() == "whole"
    assert extension.cached_operators("digest", root, fails).read_text() == "whole"
    other = extension.cached_operators("other", root, works)
    assert other != extension.cached_operators("digest", root, fails)


def test_an_installed_package_lends_operators_of_the_same_sources(tmp_path: Path) -> None:
    for name in ("old", "same"):
        file = write_operators(tmp_path / name / "torchrec_pt")
        file.with_name(extension.SOURCES).write_text(name)
    folders = [str(tmp_path / name) for name in ("nowhere", "old", "same")]
    assert extension.installed_operators("same", folders) == file
    assert extension.installed_operators("new", folders) is None


def test_no_compiler_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(ValueError, match=r"no C\+\+ compiler \(no-such-compiler\)") as said:
        extension.build(root, root / "lib")
    assert "\n" not in str(said.value)


def test_what_the_compiler_refuses_is_one_line(root: Path, tmp_path: Path) -> None:
    (root / "setup.py").write_text("raise SystemExit('a.cpp:1: error: no such thing')")
    with pytest.raises(ValueError, match=r"a.cpp:1: error: no such thing") as said:
        extension.build(root, tmp_path / "lib")
    assert "\n" not in str(said.value)


LOAD = """\
from torchrec_pt import extension
extension.installed_operators = lambda *_: None
from torchrec_pt import ops
print(extension.PACKAGE, ops.build_info())
"""


@pytest.mark.soak
def test_sources_that_were_sent_build_their_operators_once(tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    sent.mkdir()
    pack(sent, "job.json", JobFile(name="x", config={}), Code.here)
    environment = {**os.environ, "PYTHONPATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for says_so in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", LOAD],
            cwd=sent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{sent}/torchrec_pt ")
        assert ("building the operators" in done.stderr) == says_so
