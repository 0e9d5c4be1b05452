"""Which raw files a `data` section means."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from torchrec_pt.config import DataConfig
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.formats import movielens, recbole

_SUFFIXES = {
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet", ".pq"),
    "sequence": (".txt",),
    "recbole": (".inter",),
}


@dataclass(frozen=True)
class Sources:
    """The files behind a `data` section; `users` and `items` only where features come from them."""

    interactions: tuple[Path, ...]
    users: Path | None = None
    items: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        sides = [path for path in (self.users, self.items) if path]
        return tuple(sorted({*self.interactions, *sides}))


def find_sources(config: DataConfig) -> Sources:
    """The files that `read_raw` will read.

    Raises:
        DataError: nothing is there, or nothing of the format.
    """
    path = config.path
    if path.is_dir():
        files = _files_in(path, config.format)
    elif path.exists():
        files = [path]
    else:
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files:
            rule = "matches no file" if glob.has_magic(str(path)) else "does not exist"
            raise DataError(f"data.path: {path} {rule}; check the path")
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: must hold interactions, is empty; remove or replace it")
    users, items = _side_files(config, files)
    return Sources(tuple(files), users, items)


def _files_in(folder: Path, format: str) -> list[Path]:
    if format == "movielens":
        wanted: tuple[str, ...] = movielens.INTERACTIONS
        files = [file for name in wanted if (file := folder / name).is_file()][:1]
    else:
        wanted = _SUFFIXES[format]
        files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in wanted)
    if not files:
        raise DataError(
            f"data.path: {folder} holds no {' or '.join(wanted)} file; check data.format and path"
        )
    return files


def _side_files(config: DataConfig, files: list[Path]) -> tuple[Path | None, Path | None]:
    """Where user and item features stand; None means in the interactions themselves."""
    if config.format not in ("movielens", "recbole"):
        return None, None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"data.path: {config.format} is one file, found {names}; name one of them")
    family = recbole if config.format == "recbole" else movielens
    users, items = family.side_files(files[0])
    of = {feature.of for feature in config.features}
    return (
        users if "user" in of and users.is_file() else None,
        items if "item" in of and items.is_file() else None,
    )
