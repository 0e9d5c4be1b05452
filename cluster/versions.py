"""Which packages a run was submitted with, and whether the cluster has the same."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torchrec_pt

COMPARED = ("torch", "torchrec", "ray")


def installed_versions() -> dict[str, str]:
    """Package -> version, and python's minor; what is not installed is left out.

    torchrec_pt is the one that runs, which need not be the one that is installed.
    """
    found = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torchrec_pt": torchrec_pt.__version__,
    }
    for package in COMPARED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def version_mismatch(submitted: Mapping[str, str], cluster: Mapping[str, str]) -> str | None:
    """One line that names every package whose version differs, or None.

    What follows a + names the build (2.13.0+cpu, 2.13.0+cu130), which a laptop and its
    cluster need not share. A package that the submitting side lacks is not compared.
    """
    differing = [
        f"{package} {number} here, {cluster.get(package, 'none')} on the cluster"
        for package, number in submitted.items()
        if _release(number) != _release(cluster.get(package, "none"))
    ]
    if not differing:
        return None
    return f"versions differ: {'; '.join(differing)}. Results may too; use the cluster's versions"


def check_versions(
    submitted: Mapping[str, str], cluster: Mapping[str, str], *, allow_other: bool
) -> str | None:
    """The line about a mismatch that is allowed; None where there is none.

    Raises:
        ValueError: a mismatch that is not.
    """
    mismatch = version_mismatch(submitted, cluster)
    if mismatch is not None and not allow_other:
        raise ValueError(f"{mismatch}, or submit with --allow-other-versions")
    return mismatch


def _release(number: str) -> str:
    return number.partition("+")[0]
