"""Which packages a run was submitted with, and whether the cluster has the same."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

COMPARED = ("torch", "torchrec", "ray", "torchrec_pt")


def installed_versions() -> dict[str, str]:
    """Package -> version; what is not installed is left out."""
    found = {}
    for package in COMPARED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_versions(versions: Mapping[str, str]) -> str:
    """One word for a command line: torch=2.13.0,ray=2.60.0"""
    return ",".join(f"{package}={number}" for package, number in versions.items())


def read_versions(text: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in text.split(",") if word)
    return {package: number for package, _, number in pairs}


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


def _release(number: str) -> str:
    return number.partition("+")[0]
