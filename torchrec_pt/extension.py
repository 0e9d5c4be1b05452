"""Where the compiled operators come from, where the package's sources are all that there is.

A job on a cluster brings its sources along, and no build of them. The nodes' installed package
lends its own operators if they were built from the same sources; otherwise they are built, once
per node, into ~/.cache/torchrec_pt (or $XDG_CACHE_HOME).

setup.py, which runs before anything of ours is installed, loads this file by its path: it imports
nothing of ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

NAME = "torchrec_pt._C"
# Beside the operators: the digest of what they were built from.
SOURCES = "_C.sources"
PACKAGE = Path(__file__).resolve().parent

Build = Callable[[Path, Path], None]


def load_operators() -> ModuleType:
    """torchrec_pt._C: as it lies beside the package, else another's, else from the cache.

    Raises:
        ImportError: the package has neither operators nor the sources of any, or they do not load.
        ValueError: they must be built here, and cannot be.
    """
    # Not find_spec: where another torchrec_pt is installed as editable, it finds that one's.
    if any((PACKAGE / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        return importlib.import_module(NAME)
    root = PACKAGE.parent
    if not (root / "csrc").is_dir():
        raise ImportError("no _C beside the package, and no csrc to build it from")
    digest = digest_of(root)
    file = installed_operators(digest, sys.path) or cached_operators(digest, root, build)
    return _load(file)


def digest_of(root: Path) -> str:
    """Names operators by what they are built from and what they run with."""
    import torch

    said = (torch.__version__, sys.implementation.cache_tag, platform.machine())
    state = hashlib.sha256("\0".join(map(str, said)).encode())
    for path in sorted([root / "setup.py", *(root / "csrc").rglob("*")]):
        if path.is_file():
            state.update(f"{path.relative_to(root)}\0".encode())
            state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()[:32]


def installed_operators(digest: str, folders: list[str]) -> Path | None:
    """Those of another torchrec_pt on the path, if they were built from the same sources."""
    for folder in folders:
        package = Path(folder) / "torchrec_pt"
        with contextlib.suppress(OSError):
            if (package / SOURCES).read_text() == digest:
                return _operators_in(package)
    return None


def cached_operators(digest: str, root: Path, build: Build) -> Path:
    """From the cache; whoever finds none builds them while the others wait.

    Args:
        build: called with the sources' root and an empty folder; leaves torchrec_pt/_C… in it.
    Raises:
        ValueError: they cannot be built.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchrec_pt"
    # A node with nvcc and one without may share a home.
    kept = cache / f"{digest}-{'cuda' if shutil.which('nvcc') else 'cpu'}"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(kept.with_name(f"{kept.name}.lock")):
        if not kept.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as made:
                build(root, Path(made) / "lib")
                (Path(made) / "lib").rename(kept)
    return _operators_in(kept / "torchrec_pt")


def build(root: Path, folder: Path) -> None:
    """Run setup.py on a copy, since the sources may lie where nobody may write.

    Raises:
        ValueError: no compiler, or it refused the sources.
    """
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise ValueError(
            f"torchrec_pt: its operators are to be built on this node, no C++ compiler ({compiler})"
            " was found; install g++ 11 or newer in the image, or build torchrec_pt into it"
        )
    print("torchrec_pt: building the operators for this node, once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(root / "csrc", Path(copy) / "csrc")
        shutil.copyfile(root / "setup.py", Path(copy) / "setup.py")
        (Path(copy) / "torchrec_pt").mkdir()
        shutil.copyfile(__file__, Path(copy) / "torchrec_pt" / "extension.py")
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)],
            cwd=copy,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        lines = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise ValueError(
            f"torchrec_pt: its operators could not be built on this node "
            f"({lines[0].strip() if lines else f'exit code {done.returncode}'}); the log of the "
            "worker says more, or build torchrec_pt into the image"
        )


def _operators_in(package: Path) -> Path:
    for suffix in EXTENSION_SUFFIXES:
        if (package / f"_C{suffix}").is_file():
            return package / f"_C{suffix}"
    raise ImportError(f"{package}: no operators for this Python; remove this folder")


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of the node at a time; the lock of a process that died is open."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
