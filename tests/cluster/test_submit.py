"""What is decided before a job is sent: no Ray is started here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import checks, client, submit, tune
from cluster.job_file import JOB_FILE, SEARCH_FILE, JobFile, SearchFile
from cluster.packing import ROOT, Code, pack, source_files
from cluster.resources import Device, num_threads, use_gpus
from cluster.screen import failures
from cluster.versions import check_versions, installed_versions, version_mismatch
from tests.conftest import tiny_config
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config

HERE = {"torch": "2.13.0+cpu", "ray": "2.60.0"}
HOSTILE = ["", ".", "../x", "/x", "a/b", "a;rm", "$(x)", "a b", "a\n", "\na", "-x", "ä", "a" * 999]


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
    assert {"torch", "torchrec", "ray", "torchrec_pt", "python"} == installed_versions().keys()


def test_other_versions_are_an_error_unless_they_are_allowed() -> None:
    other = {"torch": "2.13.0", "ray": "2.59.1"}
    with pytest.raises(ValueError, match=r"ray 2.60.0 here, 2.59.1 .* --allow-other-versions$"):
        check_versions(HERE, other, allow_other=False)
    assert "ray 2.60.0 here" in str(check_versions(HERE, other, allow_other=True))
    assert check_versions(HERE, HERE, allow_other=False) is None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_and_ids_are_one_line(name: str) -> None:
    for check in (checks.check_name, checks.check_job_id):
        with pytest.raises(ValueError, match="given") as said:
            check(name)
        assert "\n" not in str(said.value)
        assert len(str(said.value)) < 300
    with pytest.raises(ValueError, match="name"):
        JobFile(name=name, config={})


def test_names_and_ids_of_ours_and_of_ray_are_taken() -> None:
    assert checks.check_name("demo-2.1_b") == "demo-2.1_b"
    assert checks.check_job_id("raysubmit_Xe7cvjyGJCyuCvm2") == "raysubmit_Xe7cvjyGJCyuCvm2"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("runs/demo", "demo"), ("runs/my run;rm", "my-run-rm"), ("/", "run"), ("x/" + "a" * 99, None)],
)
def test_a_job_without_a_name_has_that_of_its_folder(
    tmp_path: Path, folder: str, name: str | None
) -> None:
    config = tiny_config(tmp_path).model_copy(update={"run_dir": Path(folder)})
    found = checks.check_name(checks.name_of(config))
    assert found == (name or "a" * 63)


def test_workers_are_a_number_or_a_range() -> None:
    assert checks.parse_workers("3") == (3, 3)
    assert checks.parse_workers("2:8") == (2, 8)
    for text in (
        "0",
        "",
        "-1",
        "2:1",
        "0:2",
        "2:",
        ":2",
        "two",
        "1:2:3",
        "2\n",
        "９",
        "1e9",
        "9" * 20,
    ):
        with pytest.raises(ValueError, match=r"^--workers: is N, or MIN:MAX") as said:
            checks.parse_workers(text)
        assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("run_dir", {"run_dir": "run"}),
        ("data.path", {"data": {"format": "tsv", "path": "log.tsv"}}),
        ("data.prepared", {"data": {"format": "tsv", "path": "/log.tsv", "prepared": "here"}}),
        ("evaluate.candidates.path", {"evaluate": {"candidates": {"path": "some.parquet"}}}),
        ("finetune.start_from", {"pretrain": None, "finetune": {"start_from": "run"}}),
    ],
)
def test_a_cluster_refuses_relative_paths(
    tmp_path: Path, key: str, section: dict[str, Any]
) -> None:
    checks.check_shared_paths(tiny_config(tmp_path), "s3://bucket/runs")
    with pytest.raises(ValueError, match=f"^{key}: .* must be absolute"):
        checks.check_shared_paths(tiny_config(tmp_path, **section))
    with pytest.raises(ValueError, match=r"^--storage: .* must be absolute"):
        checks.check_shared_paths(tiny_config(tmp_path), "runs")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_configuration_reaches_the_job_as_it_was(tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    pack(tmp_path, JOB_FILE, JobFile(name="x", config=config.model_dump(mode="json")), Code.image)
    read = JobFile.model_validate_json((tmp_path / JOB_FILE).read_text(encoding="utf-8"))
    assert RunConfig.model_validate(read.config) == config


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[client.Asked]:
    """What would have been sent to a cluster."""
    asked: list[client.Asked] = []

    def keep(address: str, one: client.Asked, code: Code, *, is_followed: bool) -> int:
        asked.append(one)
        return 0

    monkeypatch.setattr(submit, "submit_to", keep)
    monkeypatch.setattr(tune, "submit", keep)
    return asked


CONFIG = """\
run_dir = "/runs/demo"
[data]
format = "tsv"
path = "/log.tsv"
[tune]
task = "pretrain"
[tune.space]
model.dim = { choices = [16, 32] }
[pretrain]
objectives = [{ name = "masked_item" }]
"""


def test_a_value_with_quotes_and_newlines_reaches_the_job_unchanged(
    tmp_path: Path, sent: list[client.Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    nasty = "a b; rm -rf $HOME 'x' \"y\"\n`z` \\ \u2028 ✓"
    (tmp_path / "run.toml").write_text(CONFIG)
    given = [str(tmp_path / "run.toml"), "--set", f"show.title={json.dumps(nasty)}"]
    for command in (submit, tune):
        monkeypatch.setattr("sys.argv", ["x", *given])
        with pytest.raises(SystemExit) as stop:
            command.main()
        assert stop.value.code == 0
    run, search = sent
    for asked, model in ((run, JobFile), (search, SearchFile)):
        pack(tmp_path, asked.file_name, asked.job, Code.image)
        read = model.model_validate_json((tmp_path / asked.file_name).read_text(encoding="utf-8"))
        assert read == asked.job
        assert read.config["show"]["title"] == nasty
        assert read.name == "demo"
    assert (run.file_name, search.file_name) == (JOB_FILE, SEARCH_FILE)


def test_options_of_the_command_line_stand_in_the_job(
    tmp_path: Path, sent: list[client.Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    words = ["--workers=2:4", "--device=cpu", "--max-failures=5", "--resize-interval=7"]
    words += ["--storage=s3://bucket/x", "--ingest=ray", "--name=mine", "--allow-other-versions"]
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "run.toml"), *words])
    with pytest.raises(SystemExit):
        submit.main()
    job = sent[0].job
    assert isinstance(job, JobFile)
    assert job.model_dump(exclude={"config", "versions"}) == {
        "name": "mine",
        "folder": None,
        "min_workers": 2,
        "max_workers": 4,
        "device": Device.cpu,
        "max_failures": 5,
        "resize_interval_s": 7.0,
        "storage": "s3://bucket/x",
        "ingest": "ray",
        "allow_other_versions": True,
    }
    assert job.versions == installed_versions()


def test_the_sources_are_sent_small_and_whole_and_nothing_else(tmp_path: Path) -> None:
    files = source_files()
    assert files == sorted(files)
    names = {str(file) for file in files}
    assert {"setup.py", "csrc/module.cpp", "torchrec_pt/extension.py", "cluster/client.py"} <= names
    assert {file.parts[0] for file in files} == {"setup.py", "csrc", "torchrec_pt", "cluster"}
    assert not [name for name in names if name.endswith((".so", ".pyc", ".sources"))]
    assert sum((ROOT / file).stat().st_size for file in files) < 2_000_000

    pack(tmp_path, JOB_FILE, JobFile(name="x", config={}), Code.here)
    packed = {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
    assert packed == {*files, Path(JOB_FILE)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml", "--local"], "nowhere.toml: cannot be read"),
        (["{config}"], "--address: which cluster?"),
        (["{config}", "--address", "head:8265"], "--address: is the dashboard's, http://HEAD:8265"),
        (["{config}", "--local", "--address", "http://127.0.0.1:1"], "drop one of them"),
        (["{config}", "--local", "--set", "data.pth=1"], 'did you mean "path"?'),
        (["{config}", "--local", "--workers", "2:1"], "--workers: is N, or MIN:MAX"),
        (["{config}", "--local", "--name", "../x"], "--name: begins with a letter"),
        (["status", "job"], "--address: which cluster?"),
        (["status", "a/../b", "--address", "http://127.0.0.1:1"], "JOB: an id is letters"),
        (["logs", "a\nb", "--address", "http://127.0.0.1:1"], "JOB: an id is letters"),
        (["stop", "", "--address", "http://127.0.0.1:1"], "JOB: an id is letters"),
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
    config.write_text(CONFIG)
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
    checks.refuse_address("http://head:8265")


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
