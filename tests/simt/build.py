"""Compiles device sources for the executor, and links them with it.

Two flavours, because one program cannot be watched by both:
    races       every load and store of device code is checked against the rules of CUDA
    sanitized   AddressSanitizer and UndefinedBehaviorSanitizer watch device code; a process that
                loads such a library must be started with `sanitized_environment()`
Results are kept under build/simt by a hash of all that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Flavour = Literal["races", "sanitized"]

SIMT = Path(__file__).resolve().parent
ROOT = SIMT.parents[1]
BUILD = ROOT / "build" / "simt"
COMPILER = shutil.which("g++")
MAX_JOBS = 2

EXECUTOR_SOURCES = tuple(sorted(SIMT.glob("*.cpp")))
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-g1", "-fdiagnostics-color=never")
# The executor itself is not watched: it says what it touches.
EXECUTOR_FLAGS = ("-O3", "-fvisibility=hidden")
EXECUTOR_DEFINES = {"races": ("-DSIMT_RACES",), "sanitized": ("-DSIMT_SANITIZED",)}
# Kernels see one block of shared memory as many types. Loops must not become calls of memcpy and
# memset: the hooks would not see what these touch.
DEVICE_FLAGS = (
    "-O2",
    "-fno-strict-aliasing",
    "-fno-tree-loop-distribute-patterns",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
)
WATCH_FLAGS = {
    "races": ("-fsanitize=thread",),
    "sanitized": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}
HOST_FLAGS = ("-O2",)
# hooks.cpp stands in for the library of -fsanitize=thread, which is therefore not linked.
LINK_FLAGS = {"races": (), "sanitized": ("-fsanitize=address,undefined",)}


@dataclass(frozen=True)
class _Unit:
    """One source and how it is compiled."""

    source: Path
    flags: tuple[str, ...]


def build_shared_library(
    name: str,
    device_sources: Sequence[Path],
    *,
    flavour: Flavour,
    host_sources: Sequence[Path] = (),
    include_dirs: Sequence[Path | str] = (),
    flags: Sequence[str] = (),
    device_flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
) -> Path:
    """Build a shared library of device code, host code and the executor.

    Args:
        device_sources: .cu files (or .cpp): watched as the flavour says.
        host_sources: not watched; these may include torch.
        include_dirs: besides csrc and tests, for all sources.
        flags: for device and host sources, after all others.
        device_flags: for device sources, after these.
        link_flags: at the end of the link command (-L, -l, -Wl,-rpath).
    Returns:
        The library; the same path as long as nothing that goes into it changes.
    Raises:
        RuntimeError: the compiler's complaint.
    """
    units = _units(device_sources, host_sources, flavour, include_dirs, flags, device_flags)
    link = ("-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined-version", *LINK_FLAGS[flavour])
    return _build(f"{name}-{flavour}", ".so", units, (*link, *link_flags))


def build_program(
    name: str,
    device_sources: Sequence[Path],
    *,
    flavour: Flavour,
    host_sources: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Build an executable instead; one of the sources holds main()."""
    units = _units(device_sources, host_sources, flavour, (), flags, ())
    # -rdynamic: the executor looks up the names of kernels.
    return _build(f"{name}-{flavour}", "", units, ("-rdynamic", *LINK_FLAGS[flavour]))


def sanitized_environment() -> dict[str, str]:
    """The environment of a process, of Python for instance, that loads a sanitized library.

    Both libraries go first: AddressSanitizer must see every allocation, and finds the C++ runtime,
    whose exceptions it watches, only if that is loaded at the start. What Python itself never frees
    is not of interest.
    """
    preload = [_library_file("libasan.so"), _library_file("libstdc++.so.6")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _units(
    device_sources: Sequence[Path],
    host_sources: Sequence[Path],
    flavour: Flavour,
    include_dirs: Sequence[Path | str],
    flags: Sequence[str],
    device_flags: Sequence[str],
) -> list[_Unit]:
    includes = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", *(f"-I{at}" for at in include_dirs))
    executor = (*COMMON_FLAGS, *EXECUTOR_FLAGS, *EXECUTOR_DEFINES[flavour], *includes[:2])
    device = (*COMMON_FLAGS, *DEVICE_FLAGS, *WATCH_FLAGS[flavour], *includes, *flags, *device_flags)
    host = (*COMMON_FLAGS, *HOST_FLAGS, *includes, *flags)
    return [
        *(_Unit(source, executor) for source in EXECUTOR_SOURCES),
        *(_Unit(source.resolve(), device) for source in device_sources),
        *(_Unit(source.resolve(), host) for source in host_sources),
    ]


def _build(name: str, suffix: str, units: Sequence[_Unit], link_flags: Sequence[str]) -> Path:
    if COMPILER is None:
        raise RuntimeError("g++: not found; install it to run kernels without a GPU")
    with ThreadPoolExecutor(MAX_JOBS) as jobs:
        objects = list(jobs.map(_compile, units))
    key = _hash([*(path.name for path in objects), *link_flags])
    target = BUILD / f"{name}-{key}{suffix}"
    if not target.exists():
        _run([COMPILER, *map(str, objects), *link_flags, "-ldl"], target)
    return target


def _compile(unit: _Unit) -> Path:
    key = _hash([_compiler_version(), _headers(unit), unit.source.read_text(), *unit.flags])
    target = BUILD / "objects" / f"{unit.source.stem}-{key}.o"
    if not target.exists():
        assert COMPILER is not None
        _run([COMPILER, *unit.flags, "-x", "c++", "-c", str(unit.source)], target)
    return target


def _run(command: Sequence[str], target: Path) -> None:
    """Make target by a command; it appears whole or not at all, whoever else builds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    unfinished.replace(target)


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _headers(unit: _Unit) -> str:
    """All that it may include: what stands beside it, what all of csrc shares, the executor."""
    folders = {SIMT, ROOT / "csrc" / "device", unit.source.parent}
    found = {path for at in folders for path in at.rglob("*.*h") if path.suffix in (".h", ".cuh")}
    found |= set((ROOT / "csrc").glob("*.h"))
    return _hash(text for path in sorted(found) for text in (path.name, path.read_text()))


@cache
def _compiler_version() -> str:
    assert COMPILER is not None
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout


def _library_file(name: str) -> str:
    assert COMPILER is not None
    command = [COMPILER, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return str(Path(found).resolve())
