"""What waits on the disk in partitions becomes the dataset that memory would hold, to the byte."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.data.logs import CASES, MISTAKES, TIMES, config_of, content, spoil, write_logs
from torchrec_pt.data import partitioned_engine
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.partitioned_engine import PartitionedInteractions, Sizes, open_locally
from torchrec_pt.data.polars_engine import PolarsInteractions
from torchrec_pt.data.prepare import prepare
from torchrec_pt.data.readers import read_raw

# So that a small log has several blocks and partitions, some of them without rows.
in_partitions = partial(PartitionedInteractions, sizes=Sizes(block=300, partition=150))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    write_logs(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_partitions_make_the_dataset_of_memory(logs: Path, tmp_path: Path, case: str) -> None:
    whole = config_of(logs, tmp_path / "whole", **CASES[case])
    config = config_of(logs, tmp_path / "partitions", **CASES[case])
    prepare(whole.data, whole.prepared_dir, whole.seed, PolarsInteractions)
    prepare(config.data, config.prepared_dir, config.seed, in_partitions)
    found, expected = content(config.prepared_dir), content(whole.prepared_dir)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert [path.name for path in config.run_dir.iterdir()] == ["prepared"]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_the_line_of_memory(logs: Path, tmp_path: Path, name: str) -> None:
    changed = spoil(logs, name, tmp_path)
    data = {"format": "csv", "columns": TIMES, **changed}
    folder = tmp_path if any(tmp_path.glob("log.*")) else logs
    config = config_of(folder, tmp_path / "run", **data)
    with pytest.raises(DataError) as expected:
        prepare(config.data, config.prepared_dir, config.seed, PolarsInteractions)
    with pytest.raises(DataError) as found:
        prepare(config.data, config.prepared_dir, config.seed, in_partitions)
    assert str(found.value) == str(expected.value)
    assert not config.run_dir.exists() or not any(config.run_dir.iterdir())


def test_a_long_log_goes_by_partitions(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(logs, tmp_path, format="csv", columns=TIMES).data
    raw = read_raw(config)
    for rows_in_memory, engine in ((1200, PolarsInteractions), (1199, PartitionedInteractions)):
        monkeypatch.setattr(partitioned_engine, "ROWS_IN_MEMORY", rows_in_memory)
        assert type(open_locally(config, raw, tmp_path / "scratch")) is engine
