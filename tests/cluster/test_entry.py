"""What a job refuses before it looks for a Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import entry
from cluster.job_file import JobFile
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise AssertionError("a Ray was looked for")

    monkeypatch.setattr("ray.init", init)


def _job(folder: Path, **changed: Any) -> dict[str, Any]:
    config = tiny_config(folder).model_dump(mode="json")
    return {"name": "demo", "config": config, **changed}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "a b"}, "name: "),
        ({"wrokers": 2}, "wrokers: "),
        ({"min_workers": 3}, "--workers: MIN:MAX must ascend, given 3:2"),
        ({"versions": {"ray": "1.0"}}, "ray 1.0 here"),
        ({"versions": {"ray": "1.0"}}, "--allow-other-versions"),
        ({"config": {"run_dir": "r"}}, "data: required, but missing"),
    ],
)
def test_a_job_that_cannot_be_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    said: str,
) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(_job(tmp_path, **changed)))
    monkeypatch.setattr("sys.argv", ["cluster.entry", str(path)])
    with pytest.raises(SystemExit) as stop:
        entry.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("torchrec-pt: ")
    assert error.count("\n") == 1


def test_a_job_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.json: cannot be read"):
        entry.load_job(tmp_path / "no.json")


def test_a_job_file_reads_as_it_was_written(tmp_path: Path) -> None:
    job = JobFile(**_job(tmp_path, min_workers=1, max_workers=4, storage="/kept"))
    (tmp_path / "job.json").write_text(job.model_dump_json())
    assert entry.load_job(tmp_path / "job.json") == job
