"""Ray Data prepares the dataset that the local engine prepares, to the byte."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import ray

from cluster.ingest import prepare_on_ray
from tests.data.logs import CASES, MISTAKES, TIMES, config_of, content, spoil, write_logs
from torchrec_pt import pipeline
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import load_manifest
from torchrec_pt.data.partitioned_engine import Sizes
from torchrec_pt.data.prepare import prepare

# The smallest that Ray takes.
STORE_BYTES = 75 * 2**20
# So that a small log has several blocks and partitions, some of them without rows.
SMALL = Sizes(block=300, partition=150)


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("POLARS_MAX_THREADS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    write_logs(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ray_data_prepares_the_same_bytes(
    on_ray: None, logs: Path, tmp_path: Path, case: str
) -> None:
    local = config_of(logs, tmp_path / "local", **CASES[case])
    config = config_of(logs, tmp_path / "ray", **CASES[case])
    prepare(local.data, local.prepared_dir, local.seed)
    prepare_on_ray(config, sizes=SMALL)
    found, expected = content(config.prepared_dir), content(local.prepared_dir)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert [path.name for path in config.run_dir.iterdir()] == ["prepared"]


def test_the_library_finds_the_dataset_done(
    on_ray: None, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where paths are relative."""
    monkeypatch.chdir(logs)
    config = config_of(Path(), Path(os.path.relpath(tmp_path / "run")), format="csv", columns=TIMES)
    manifest = prepare_on_ray(config, sizes=SMALL)
    before = (config.prepared_dir / "manifest.json").stat().st_mtime_ns
    assert pipeline.prepare(config).manifest == manifest
    assert (config.prepared_dir / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_the_line_of_the_local_engine(
    on_ray: None, logs: Path, tmp_path: Path, name: str
) -> None:
    changed = spoil(logs, name, tmp_path)
    data = {"format": "csv", "columns": TIMES, **changed}
    folder = tmp_path if any(tmp_path.glob("log.*")) else logs
    config = config_of(folder, tmp_path / "run", **data)
    with pytest.raises(DataError) as local:
        prepare(config.data, config.prepared_dir, config.seed)
    with pytest.raises(DataError) as found:
        prepare_on_ray(config, sizes=SMALL)
    assert str(found.value) == str(local.value)
    assert "\n" not in str(found.value)
    assert not config.run_dir.exists() or not any(config.run_dir.iterdir())


def write_wide(path: Path, num_rows: int) -> int:
    """A parquet log of about 140 bytes a row that compress badly; its size in memory."""
    draw = np.random.default_rng(0)
    words = draw.bytes(60 * num_rows).hex()
    frame = pl.DataFrame(
        {
            "user_id": (5000 * draw.random(num_rows) ** 2).astype(np.int64),
            "item_id": (2000 * draw.random(num_rows) ** 2).astype(np.int64),
            "timestamp": np.arange(num_rows),
            "words": [words[begin : begin + 120] for begin in range(0, len(words), 120)],
        }
    )
    frame.write_parquet(path, row_group_size=50_000)
    return int(frame.estimated_size())


def prepare_wide(tmp_path: Path, num_rows: int, sizes: Sizes) -> float:
    """How often the log would fill the object store; the datasets are the same."""
    num_bytes = write_wide(tmp_path / "log.parquet", num_rows)
    data = {
        "format": "parquet",
        "columns": {"timestamp": "timestamp"},
        "features": [{"column": "words", "of": "interaction", "kind": "text"}],
    }
    local = config_of(tmp_path, tmp_path / "local", **data)
    config = config_of(tmp_path, tmp_path / "ray", **data)
    prepare_on_ray(config, sizes=sizes)
    prepare(local.data, local.prepared_dir, local.seed)
    assert load_manifest(config.prepared_dir).num_interactions == num_rows
    assert content(config.prepared_dir) == content(local.prepared_dir)
    return num_bytes / STORE_BYTES


def test_a_log_larger_than_the_object_store_passes(on_ray: None, tmp_path: Path) -> None:
    assert prepare_wide(tmp_path, 700_000, Sizes(block=50_000, partition=200_000)) > 1


@pytest.mark.soak
def test_tasks_hold_no_more_of_a_log_twice_as_long(on_ray: None, tmp_path: Path) -> None:
    sizes = Sizes(block=50_000, partition=200_000)
    peaks, times = [], []
    # Both longer than what polars reads ahead of the block it gives, some 200 MiB.
    for num_rows in (2_400_000, 4_800_000):
        folder = tmp_path / str(num_rows)
        folder.mkdir()
        times.append(prepare_wide(folder, num_rows, sizes))
        peaks.append(max(ray.get([_peak_kib.remote() for _ in range(20)])))
    assert times[0] > 4
    assert times[1] > 8
    # Kibibytes; the log grew by 340 MB. What is left is the allocator's.
    assert peaks[1] < peaks[0] + 100_000


@ray.remote
def _peak_kib() -> int:
    """Of the process of tasks that runs this."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
