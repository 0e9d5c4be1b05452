"""What is decided before a job runs: no Ray is started here."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cluster import submit
from cluster.resources import Device, num_threads, use_gpus
from cluster.screen import failures
from cluster.versions import installed_versions, read_versions, version_mismatch, write_versions
from tests.conftest import tiny_config

HERE = {"torch": "2.13.0+cpu", "ray": "2.60.0"}


def test_equal_releases_match_whatever_their_build() -> None:
    assert version_mismatch(HERE, {"torch": "2.13.0+cu130", "ray": "2.60.0"}) is None


def test_every_differing_package_stands_on_the_one_line() -> None:
    line = version_mismatch(HERE, {"torch": "2.12.1+cu130"})
    assert line is not None
    assert "torch 2.13.0+cpu here, 2.12.1+cu130 on the cluster" in line
    assert "ray 2.60.0 here, none on the cluster" in line
    assert "\n" not in line


def test_what_the_submitting_side_lacks_is_not_compared() -> None:
    assert version_mismatch({"ray": "2.60.0"}, {"torch": "2.12.1", "ray": "2.60.0"}) is None


def test_versions_survive_the_command_line() -> None:
    assert {"torch", "torchrec", "ray"} <= installed_versions().keys()
    assert read_versions(write_versions(installed_versions())) == installed_versions()
    assert read_versions("") == {}


def test_the_entrypoint_gives_the_shell_every_word_as_it_was() -> None:
    nasty = "show.title=a b; rm -rf $HOME 'x' \"y\""
    command = submit.entrypoint("python", Path("my run.toml"), ["--workers=3"], [nasty])
    words = shlex.split(command)
    assert words[:5] == ["python", "-m", "cluster.job", "my run.toml", "--workers=3"]
    assert words[5].startswith("--submitted-with=torch=")
    assert words[6:] == [f"--set={nasty}"]


def test_a_config_named_like_an_option_stays_a_config() -> None:
    words = shlex.split(submit.entrypoint("python", Path("/a/-x.toml"), [], []))
    assert words[3] == "/a/-x.toml"


@pytest.mark.parametrize("key", ["run_dir", "data.path", "data.prepared"])
def test_a_cluster_refuses_relative_paths(tmp_path: Path, key: str) -> None:
    config = tiny_config(tmp_path)
    submit.check_shared_paths(config)
    if key == "run_dir":
        config = config.model_copy(update={"run_dir": Path("run")})
    else:
        data = config.data.model_copy(update={key.removeprefix("data."): Path("here")})
        config = config.model_copy(update={"data": data})
    with pytest.raises(ValueError, match=f"^{key}: .* must be absolute"):
        submit.check_shared_paths(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml", "--local"], "nowhere.toml: cannot be read"),
        (["{config}"], "--address: which cluster?"),
        (["{config}", "--local", "--address", "http://127.0.0.1:1"], "drop one of them"),
        (["{config}", "--local", "--set", "data.pth=1"], 'did you mean "path"?'),
        (["status", "job"], "--address: which cluster?"),
        (["list", "--address", "http://127.0.0.1:1"], "is it the dashboard's address?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('run_dir = "run"\n[data]\nformat = "tsv"\npath = "log.tsv"\n')
    filled = [argument.format(config=config) for argument in arguments]
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr("sys.argv", ["cluster.submit", *filled])
    with pytest.raises(SystemExit) as stop:
        submit.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_local_beats_an_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    submit.refuse_address("http://head:8265")


def test_workers_of_a_node_share_its_cores() -> None:
    assert [num_threads(cpus, workers) for cpus, workers in [(2, 2), (8, 2), (2, 4)]] == [1, 4, 1]


def test_gpus_are_used_where_there_are_any() -> None:
    assert not use_gpus(Device.auto, num_workers=2, num_gpus=0)
    assert use_gpus(Device.auto, num_workers=2, num_gpus=2)
    assert not use_gpus(Device.cpu, num_workers=2, num_gpus=2)
    # A cluster that scales has no GPU until one is asked for.
    assert use_gpus(Device.cuda, num_workers=2, num_gpus=0)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="use --workers 1, or --device cpu"):
        use_gpus(Device.auto, num_workers=2, num_gpus=1)


def test_failures_are_one_line_with_the_ranks_that_share_a_cause() -> None:
    lost = RuntimeError("Traceback\n  File x\nRuntimeError: Connection closed\n")
    line = failures({2: lost, 1: MemoryError(), 0: lost})
    assert line == "rank 0, 2: RuntimeError: Connection closed; rank 1: MemoryError"
