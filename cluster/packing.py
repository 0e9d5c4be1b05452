"""What a job is sent: its file, and the sources that it runs where the cluster has none of its own.

Ray names a package by its content, so the same sources and the same file are uploaded once.
"""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
# Whole folders would bring builds, data and runs along.
SOURCES = (
    "setup.py",
    "csrc/**/*",
    "torchrec_pt/**/*.py",
    "torchrec_pt/**/*.j2",
    "torchrec_pt/py.typed",
    "cluster/**/*.py",
)


class Code(str, Enum):
    """Whose torchrec_pt a job runs: the sources here, sent along, or that of the nodes' image."""

    here = "here"
    image = "image"


def settle_code(code: Code | None) -> Code:
    """The default: the sources here, where the operators can be built from them.

    Raises:
        ValueError: sources are to be sent, and this is an installed package.
    """
    has_sources = (ROOT / "csrc").is_dir() and (ROOT / "setup.py").is_file()
    if code is None:
        return Code.here if has_sources else Code.image
    if code is Code.here and not has_sources:
        raise ValueError(
            "--code here: sends the sources, this torchrec_pt is installed without csrc; submit "
            "from a checkout, or use --code image"
        )
    return code


def pack(folder: Path, file_name: str, job: BaseModel, code: Code) -> None:
    """Fill an empty folder with what becomes the job's working directory."""
    (folder / file_name).write_text(job.model_dump_json(indent=1), encoding="utf-8")
    if code is Code.image:
        return
    for source in source_files():
        target = folder / source
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / source, target)


def source_files() -> list[Path]:
    """What `Code.here` sends, relative to the checkout."""
    found = {path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(ROOT) for path in found)
