"""What a worker gets of a node: GPUs and threads. Decided here, handed to Ray."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def use_gpus(device: Device, num_workers: int, num_gpus: int) -> bool:
    """Whether every worker gets a GPU; `auto` takes GPUs where the cluster has any.

    `cuda` is not checked against the GPUs that are there: a cluster that scales may have
    none yet.

    Raises:
        ValueError: `auto`, and fewer GPUs than workers.
    """
    if device is not Device.auto:
        return device is Device.cuda
    if 0 < num_gpus < num_workers:
        raise ValueError(
            f"--workers: a worker takes one GPU, given {num_workers} workers for {num_gpus} GPUs; "
            f"use --workers {num_gpus}, or --device cpu"
        )
    return num_gpus > 0


def num_threads(num_node_cpus: int, num_node_workers: int) -> int:
    """Threads of one worker, so that the workers of a node share its cores."""
    return max(1, num_node_cpus // num_node_workers)


def num_places(resources: Mapping[str, float], on_gpus: bool) -> int:
    """Workers that a cluster of these resources has room for: each takes a CPU, or a GPU too."""
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    return min(num_cpus, num_gpus) if on_gpus else num_cpus


def num_side_by_side(min_workers: int, num_places: int) -> int:
    """Stages that can train at a time, each with its fewest workers; at least one.

    More of them could each hold some workers and wait for the others' for ever.
    """
    return max(1, num_places // min_workers)
