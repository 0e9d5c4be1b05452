"""Jobs sent to a cluster, and what is asked about them afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import submit
from cluster.nodes import LocalCluster
from cluster.packing import ROOT
from tests.conftest import RUN


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line."""
    monkeypatch.setattr("sys.argv", ["cluster.submit", *words])
    code = 0
    try:
        submit.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_mistake_found_by_a_job_is_one_line_and_its_exit_code(
    tmp_path: Path,
    two_nodes: LocalCluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", two_nodes.dashboard)
    (tmp_path / "run.toml").write_text(
        RUN.format(run_dir=tmp_path / "run", log=tmp_path / "no.tsv", epochs=1)
    )
    given = [str(tmp_path / "run.toml"), "--workers=1", "--name=mine", "--follow"]
    code, said, errors = run(capsys, monkeypatch, *given)
    assert code == 2, said + errors
    assert f"data.path: {tmp_path / 'no.tsv'} does not exist; check the path" in said
    assert "Traceback" not in said
    assert "Running entrypoint" not in said  # Ray's own words
    assert "Runtime env" not in said
    assert not errors

    job = said.split()[1].removesuffix(";")
    assert job.startswith("mine-")
    for words, expected in (
        (["status", job], "FAILED"),
        (["logs", job], "does not exist; check the path"),
        (["list"], f"{job}  FAILED"),
        (["list"], "  python -m cluster.entry job.json"),
        (["stop", job], "was FAILED already"),
    ):
        code, said, errors = run(capsys, monkeypatch, *words)
        assert (code, errors) == (0, "")
        assert expected in said
        assert "Running entrypoint" not in said
    code, said, errors = run(capsys, monkeypatch, "status", "no-such-job")
    assert code == 1
    assert "no-such-job does not exist" in errors
    assert errors.count("\n") == 1


def test_another_ray_on_the_cluster_is_one_line_before_anything_is_sent(
    tmp_path: Path,
    two_nodes: LocalCluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.client.installed_versions", lambda: {"ray": "1.2.3"})
    (tmp_path / "run.toml").write_text(RUN.format(run_dir="/run", log="/log.tsv", epochs=1))
    given = [str(tmp_path / "run.toml"), "--address", two_nodes.dashboard]
    code, said, errors = run(capsys, monkeypatch, *given)
    assert code == 2
    assert not said
    assert "ray 1.2.3 here, " in errors
    assert errors.endswith("or submit with --allow-other-versions\n")
    assert errors.count("\n") == 1


@pytest.mark.soak
def test_a_local_job_takes_relative_paths_from_here(tmp_path: Path, cycle_folder: Path) -> None:
    (tmp_path / "log.tsv").symlink_to(cycle_folder / "log.tsv")
    (tmp_path / "run.toml").write_text(RUN.format(run_dir="run", log="log.tsv", epochs=1))
    words = ["cluster.submit", "run.toml", "--local", "--nodes=2", "--workers=2"]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers on CPUs; dashboard: http://127.0.0.1:" in done.stdout
    assert "prepare: 37 users, 30 items" in done.stdout
    assert (tmp_path / "run" / "pretrain" / "result.json").exists()
    assert not done.stderr
