"""What is left in a folder or an S3 bucket is what another node finds."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from cluster.storage import Storage, StorageError
from tests.conftest import tiny_config
from torchrec_pt import pipeline
from torchrec_pt.checkpoint import MARK
from torchrec_pt.runs import load_result
from torchrec_pt.train import Validated

BUCKET = "runs"
# Leaves a run, and is killed where the content or the index of a stage is about to be complete.
KILLED = """\
import os, signal, sys
from pathlib import Path
from cluster.storage import Storage

write = Storage._write

def half_of(blocks):
    yield next(iter(blocks))[:1]
    os.kill(os.getpid(), signal.SIGKILL)

def killed(self, path, blocks):
    write(self, path, half_of(blocks) if sys.argv[3] in path else blocks)

Storage._write = killed
Storage.open(sys.argv[1], "r").leave(Path(sys.argv[2]))
"""


@dataclass(frozen=True)
class Server:
    port: int

    def uri(self, path: str) -> str:
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def require_credentials(self, is_required: bool) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/moto-api/reset-auth",
            data=b"0" if is_required else b"1000000000",
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request, timeout=60).close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        try:
            _, port = moto.get_host_and_port()
            boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket=BUCKET)
            yield Server(port)
        finally:
            moto.stop()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> str:
    if request.param == "s3":
        return server.uri(f"{BUCKET}/{tmp_path.name}")
    (tmp_path / "shared").mkdir()
    return str(tmp_path / "shared")


def write(run_dir: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(text)
    return run_dir


def read(run_dir: Path) -> dict[str, str]:
    """Path -> text of every file but the hidden ones."""
    return {
        path.relative_to(run_dir).as_posix(): path.read_text()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def fetched(place: str, run_dir: Path, folders: list[str] | None = None) -> dict[str, str]:
    Storage.open(place, "r").fetch(run_dir, folders)
    return read(run_dir)


STEP_1, STEP_2 = "pretrain/checkpoints/step-00000001", "pretrain/checkpoints/step-00000002"
RUN = {
    "config.json": "{}",
    f"{STEP_1}/{MARK}": "one",
    f"{STEP_1}/shard.safetensors": "shard",
    "pretrain/result.json": "first",
    "finetune/ctr/scratch/result.json": "ctr",
}


def test_another_node_finds_what_was_left(place: str, tmp_path: Path) -> None:
    here = write(tmp_path / "here", {**RUN, "ray/state": "Ray's", "pretrain/.x.partial": "half"})
    Storage.open(place, "r").leave(here)
    assert fetched(place, tmp_path / "there") == RUN
    some = fetched(place, tmp_path / "some", ["finetune"])
    assert list(some) == ["finetune/ctr/scratch/result.json"]


def test_what_was_pruned_goes_away_everywhere_and_what_was_never_left_stays(
    place: str, tmp_path: Path
) -> None:
    here, there = write(tmp_path / "here", RUN), tmp_path / "there"
    storage = Storage.open(place, "r")
    storage.leave(here)
    fetched(place, there)
    write(there, {f"{STEP_2}/{MARK}": "two"})
    for name in (MARK, "shard.safetensors"):
        (there / STEP_1 / name).unlink()
    (there / STEP_1).rmdir()
    storage.leave(there, ["pretrain"])
    write(here, {"pretrain/notes.txt": "of this node"})
    found = fetched(place, here)
    assert f"{STEP_2}/{MARK}" in found
    assert "pretrain/notes.txt" in found
    assert not (here / STEP_1).exists()
    names = {Path(info.path).name for info in _all_files(storage)}
    assert not any(name.endswith("shard.safetensors") for name in names)


def test_a_checkpoint_of_the_same_step_is_replaced_as_a_whole(place: str, tmp_path: Path) -> None:
    """Its mark names every file beside it, so one of another number of ranks would damage it."""
    storage = Storage.open(place, "r")
    storage.leave(write(tmp_path / "here", RUN))
    there = write(tmp_path / "there", {f"{STEP_1}/shard-of-two.safetensors": "other"})
    assert fetched(place, there) == RUN


def test_what_is_unchanged_is_not_sent_again(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = write(tmp_path / "here", RUN)
    Storage.open(place, "r").leave(here)
    sent: list[str] = []
    real = Storage._write
    monkeypatch.setattr(
        Storage, "_write", lambda self, path, blocks: (sent.append(path), real(self, path, blocks))
    )
    Storage.open(place, "r").leave(here)
    assert sent == []
    write(here, {"pretrain/result.json": "second"})
    Storage.open(place, "r").leave(here)
    assert [Path(path).name[-11:] for path in sent] == ["result.json", "index.json"]


@pytest.mark.parametrize("where", ["-result.json", "pretrain/index.json"])
def test_a_kill_while_leaving_keeps_the_earlier_state(
    place: str, where: str, tmp_path: Path
) -> None:
    here = write(tmp_path / "here", {f"pretrain/{n}": "1" for n in ("result.json", "plan.json")})
    Storage.open(place, "r").leave(here)
    earlier = read(here)
    write(here, {f"pretrain/{name}": "2" for name in ("result.json", "plan.json")})
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, place, str(here), where], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert fetched(place, tmp_path / "there") == earlier
    Storage.open(place, "r").leave(here)
    assert fetched(place, tmp_path / "there") == read(here)


def test_damage_is_found(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    storage = Storage.open(str(tmp_path / "shared"), "r")
    storage.leave(write(tmp_path / "here", RUN))
    content = next((tmp_path / "shared/r/pretrain/files").glob("*-result.json"))
    content.write_text("other")
    with pytest.raises(StorageError, match="damaged, or changes") as caught:
        storage.fetch(tmp_path / "there")
    assert_one_line(caught.value)
    assert not (tmp_path / "there/pretrain/result.json").exists()


def test_an_index_cannot_name_files_outside_the_run(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    storage = Storage.open(str(tmp_path / "shared"), "r")
    storage.leave(write(tmp_path / "here", RUN))
    index = tmp_path / "shared/r/pretrain/index.json"
    files = json.loads(index.read_text())["files"]
    files["pretrain/../../outside"] = files["pretrain/result.json"]
    index.write_text(json.dumps({"files": files}))
    with pytest.raises(StorageError, match="which is no file of a run"):
        storage.fetch(tmp_path / "there")


def test_a_run_goes_on_from_the_storage_alone(
    place: str, cycle_folder: Path, tmp_path: Path
) -> None:
    train = {"epochs": 4, "batch_size": 10, "objectives": [{"name": "masked_item"}]}
    config = tiny_config(cycle_folder, pretrain=train)
    whole = config.model_copy(update={"run_dir": tmp_path / "whole"})
    here = config.model_copy(update={"run_dir": tmp_path / "here"})
    there = config.model_copy(update={"run_dir": tmp_path / "there"})
    pipeline.prepare(whole)
    expected = pipeline.pretrain(whole).values

    def lose_node(told: Validated) -> None:
        if len(told.curve) == 2:
            raise KeyboardInterrupt

    pipeline.prepare(here)
    with pytest.raises(KeyboardInterrupt):
        pipeline.pretrain(here, on_validation=lose_node)
    Storage.open(place, "r").leave(here.run_dir)
    Storage.open(place, "r").fetch(there.run_dir)
    assert list((there.run_dir / "pretrain/checkpoints").glob("step-*"))
    found = pipeline.pretrain(there).values
    assert found["curve"] == expected["curve"]
    assert found["metrics"] == expected["metrics"]
    assert load_result(here.run_dir / "pretrain") is None


# --- mistakes -----------------------------------------------------------------------------------


def assert_one_line(error: Exception) -> None:
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("runs", "must be an absolute folder or s3://bucket/prefix"),
        ("gs://bucket/runs", "must be an absolute folder or s3://bucket/prefix"),
        ("s3:///runs", "names no bucket"),
        ("s3://key:secret@bucket/runs", "credentials would stand in logs"),
        ("s3://bucket/runs?endpoint_override=127.0.0.1&nonsense=1", "cannot be opened"),
        ("/no/such/folder", "is not there; make it first"),
    ],
)
def test_a_bad_place_is_one_line(where: str, said: str) -> None:
    with pytest.raises(StorageError, match=said) as caught:
        Storage.open(where, "r")
    assert_one_line(caught.value)
    assert "secret" not in str(caught.value)


def test_a_bad_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="--name: must match"):
        Storage.open(str(tmp_path), "../other")


def test_a_bucket_that_is_not_there_is_one_line(server: Server) -> None:
    with pytest.raises(StorageError, match="no-such is not there") as caught:
        Storage.open(server.uri("no-such/prefix"), "r")
    assert_one_line(caught.value)


def test_credentials_that_are_refused_are_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    server.require_credentials(True)
    try:
        with pytest.raises(StorageError, match="the credentials in the environment") as caught:
            Storage.open(server.uri(f"{BUCKET}/prefix"), "r")
    finally:
        server.require_credentials(False)
    assert_one_line(caught.value)


def test_a_server_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    uri = "s3://runs/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(StorageError, match="check the place") as caught:
        Storage.open(uri, "r")
    assert_one_line(caught.value)


def _all_files(storage: Storage) -> list[fs.FileInfo]:
    return storage.system.get_file_info(fs.FileSelector(storage.root, recursive=True))
