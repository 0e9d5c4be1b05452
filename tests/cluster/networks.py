"""Two network namespaces on this machine, for what loopback does not show; needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

HERE, THERE = f"tpt-here-{os.getpid()}", f"tpt-there-{os.getpid()}"  # of a killed test some stay
ADDRESSES = {HERE: "10.213.77.1", THERE: "10.213.77.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@contextmanager
def two_networks() -> Iterator[None]:
    """Namespaces that see each other by one cable, and nothing else."""
    try:
        ip("netns", "add", HERE)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("network namespaces need root and the ip command")
    try:
        ip("netns", "add", THERE)
        ip("link", "add", "cable", "netns", HERE, "type", "veth", "peer", "cable", "netns", THERE)
        for network, address in ADDRESSES.items():
            ip("-n", network, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", network, "link", "set", "cable", "up")
            ip("-n", network, "link", "set", "lo", "up")
        yield
    finally:
        for network in ADDRESSES:
            subprocess.run(["ip", "netns", "delete", network], capture_output=True, timeout=30)
