"""What a job is asked to do: written where it is submitted, read where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.resources import Device

JOB_FILE = "job.json"
SEARCH_FILE = "search.json"
# Of jobs and of runs: becomes part of file names and ids.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class JobFile(BaseModel):
    """One run as a job.

    Attributes:
        config: the resolved configuration, as `RunConfig.model_dump(mode="json")` gives it.
        folder: relative paths of the configuration are taken from here, on every node; None
            where all of them are absolute.
        min_workers, max_workers: processes that train together; elastic where they differ.
        max_failures: how often the workers of a stage are started again.
        resize_interval_s: seconds between two looks whether more workers fit (elastic alone).
        storage: where finished stages and checkpoints are kept besides run_dir: a folder that
            every node sees, or s3://bucket/prefix; None where run_dir itself is such a folder.
        ingest: who reads the raw log: this process, or Ray Data over the cluster.
        versions: package -> version on the submitting side.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    config: dict[str, Any]
    folder: Path | None = None
    min_workers: int = Field(default=2, ge=1)
    max_workers: int = Field(default=2, ge=1)
    device: Device = Device.auto
    max_failures: int = Field(default=3, ge=0)
    resize_interval_s: float = Field(default=60.0, gt=0)
    storage: str | None = None
    ingest: Literal["local", "ray"] = "local"
    versions: dict[str, str] = {}
    allow_other_versions: bool = False

    @model_validator(mode="after")
    def _limits_ascend(self) -> JobFile:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"--workers: MIN:MAX must ascend, given {self.min_workers}:{self.max_workers}"
            )
        return self


class SearchFile(BaseModel):
    """One search as a job.

    Attributes:
        config: as of a JobFile, but what the user wrote alone: a trial's values may bring other
            defaults.
        folder, versions, allow_other_versions: as of a JobFile.
        num_parallel: trials at a time; None: one a GPU, or a CPU without GPUs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    config: dict[str, Any]
    folder: Path | None = None
    num_parallel: int | None = Field(default=None, ge=1)
    device: Device = Device.auto
    versions: dict[str, str] = {}
    allow_other_versions: bool = False
