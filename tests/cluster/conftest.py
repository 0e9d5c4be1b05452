"""One cluster for all tests that send jobs to one."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from cluster.nodes import ENVIRONMENT, LocalCluster
from cluster.packing import ROOT
from torchrec_pt import extension
from torchrec_pt.ops import _C

# Of every Ray that a test starts; ray.init would also leave a token in the home of who runs them.
os.environ.update(ENVIRONMENT)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Ray's socket paths have 107 bytes in all, too few for pytest's folders."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes with one CPU each, which have built the operators of these sources before."""
    cache = tmp_path_factory.mktemp("cache")
    device = "cuda" if shutil.which("nvcc") else "cpu"
    built = cache / "torchrec_pt" / f"{extension.digest_of(ROOT)}-{device}" / "torchrec_pt"
    built.mkdir(parents=True)
    (built / f"_C{EXTENSION_SUFFIXES[0]}").symlink_to(str(_C.__file__))
    environment = {
        "XDG_CACHE_HOME": str(cache),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with LocalCluster(num_nodes=2, cpus_per_node=1, environment=environment) as nodes:
        yield nodes
