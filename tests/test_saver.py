"""Saves are whole or nothing, in the background or not, and keep the last ones and the best."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed as dist

from torchrec_pt import checkpoint
from torchrec_pt import saver as saver_module
from torchrec_pt.checkpoint import Checkpoint, CheckpointError
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.saver import Saver

IDS = pl.Series("external_id", [7, 5, 6])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


def _saver(folder: Path, ranks: Ranks, in_background: bool = True, keep_last: int = 9) -> Saver:
    return Saver(folder, IDS, ranks, keep_last=keep_last, in_background=in_background)


def _save(saver: Saver, step: int, best_step: int = 0) -> None:
    saver.save(step, {"x": torch.full((3, 2), float(step))}, {"step": step}, best_step=best_step)


def _steps(folder: Path, ranks: Ranks) -> list[int]:
    """Of all checkpoints, each of them whole and with its own values."""
    steps = []
    for path in checkpoint.saved(folder):
        opened = Checkpoint.open(path, ranks)
        step = opened.state["step"]
        assert path == checkpoint.folder_of_step(folder, step)
        assert (opened.read("x") == step).all()
        steps.append(step)
    return steps


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "no space left")


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("in_background", [True, False])
def test_it_keeps_the_last_ones_and_the_best(
    tmp_path: Path, ranks: Ranks, in_background: bool
) -> None:
    with _saver(tmp_path, ranks, in_background, keep_last=2) as saver:
        for step in range(6):
            _save(saver, step, best_step=min(step, 1))
    assert _steps(tmp_path, ranks) == [1, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:08d}" for step in (1, 4, 5)
    ]


@pytest.mark.parametrize(
    ("keep_last", "best", "left"), [(2, 3, [3, 4, 5]), (2, 4, [4, 5]), (1, 0, [0, 5]), (9, 0, None)]
)
def test_prune_keeps_the_last_ones_and_the_best(
    tmp_path: Path, keep_last: int, best: int, left: list[int] | None
) -> None:
    for step in range(6):
        checkpoint.folder_of_step(tmp_path, step).mkdir()
    checkpoint.prune(tmp_path, keep_last, checkpoint.folder_of_step(tmp_path, best))
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.saved(tmp_path)]
    assert steps == (list(range(6)) if left is None else left)


def test_what_changes_after_a_save_is_not_in_it(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), saver_module.write_safetensors

    def waits(*given: Any) -> str:
        assert may_write.wait(60)
        return write(*given)

    monkeypatch.setattr(saver_module, "write_safetensors", waits)
    tensor, state = torch.zeros(3, 2), {"curve": [1]}
    with _saver(tmp_path, ranks) as saver:
        saver.save(1, {"x": tensor}, state, best_step=1)
        assert checkpoint.saved(tmp_path) == []  # it is under way, and we are here
        tensor.fill_(9)
        state["curve"].append(2)
        may_write.set()
    (path,) = checkpoint.saved(tmp_path)
    opened = Checkpoint.open(path, ranks)
    assert (opened.read("x") == 0).all()
    assert opened.state == {"curve": [1]}


def test_saving_a_step_again_replaces_it(tmp_path: Path, ranks: Ranks) -> None:
    with _saver(tmp_path, ranks) as saver:
        for value in (1.0, 2.0):
            saver.save(5, {"x": torch.tensor(value)}, {}, best_step=5)
    (path,) = checkpoint.saved(tmp_path)
    assert Checkpoint.open(path, ranks).read("x") == 2


def test_checkpoints_of_a_stage_share_their_ids_or_copy_them(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _saver(tmp_path, ranks, in_background=False) as saver:
        _save(saver, 1)
        _save(saver, 2)
        monkeypatch.setattr(os, "link", _full_disk)
        _save(saver, 3)
    files = [path / "items.parquet" for path in checkpoint.saved(tmp_path)]
    assert [file.stat().st_nlink for file in files] == [2, 2, 1]
    assert _steps(tmp_path, ranks) == [1, 2, 3]
    for path in checkpoint.saved(tmp_path):
        assert Checkpoint.open(path, ranks).items.to_list() == [7, 5, 6]


# --- failures -----------------------------------------------------------------------------------

PLACES = ("write_safetensors", "sha256", "fsync", "checkpoint.remove")


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    in_background: bool,
) -> None:
    message = f"{tmp_path}/step-00000002: cannot be written, No space left on device; free space"
    with _saver(tmp_path, ranks, in_background) as saver:
        _save(saver, 1)
        saver.wait()
        monkeypatch.setattr(f"torchrec_pt.saver.{place}", _full_disk)
        with pytest.raises(CheckpointError, match=message):  # noqa: PT012
            _save(saver, 2)
            saver.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        monkeypatch.undo()
        _save(saver, 2)
    assert _steps(tmp_path, ranks) == [1, 2]


def _by_next_save(saver: Saver) -> None:
    _save(saver, 2)


def _by_leaving(saver: Saver) -> None:
    pass


@pytest.mark.parametrize("told", [_by_next_save, _by_leaving, Saver.wait])
def test_a_save_that_failed_in_the_background_is_told_once(
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[[Saver], None],
) -> None:
    monkeypatch.setattr(saver_module, "write_safetensors", _full_disk)
    with (  # noqa: PT012
        pytest.raises(CheckpointError, match="step-00000001: cannot be written"),
        _saver(tmp_path, ranks) as saver,
    ):
        _save(saver, 1)
        told(saver)
    saver.wait()
    assert checkpoint.saved(tmp_path) == []


def test_an_error_of_training_waits_for_the_save_and_goes_before_its_error(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), _saver(tmp_path, ranks) as saver:  # noqa: PT012
        _save(saver, 1)
        raise KeyboardInterrupt
    assert _steps(tmp_path, ranks) == [1]
    monkeypatch.setattr(saver_module, "write_safetensors", _full_disk)
    with pytest.raises(KeyboardInterrupt), _saver(tmp_path, ranks) as saver:  # noqa: PT012
        _save(saver, 2)
        raise KeyboardInterrupt
    assert _steps(tmp_path, ranks) == [1]


@pytest.mark.parametrize("place", [*PLACES, "fsync, third", "checkpoint.prune", "shutil.rmtree"])
def test_a_kill_anywhere_leaves_whole_checkpoints_and_what_the_next_save_removes(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    name, _, nth = place.partition(", ")
    left = 2 if nth else 0

    def kill(*given: Any) -> None:
        nonlocal left
        if left == 0:
            raise _KilledError
        left -= 1

    with pytest.raises(_KilledError), _saver(tmp_path, ranks, False, keep_last=1) as saver:  # noqa: PT012
        _save(saver, 1, best_step=1)
        _save(saver, 2, best_step=1)
        monkeypatch.setattr(f"torchrec_pt.saver.{name}", kill)
        _save(saver, 3, best_step=1)  # would delete the second
    monkeypatch.undo()
    assert _steps(tmp_path, ranks) in ([1, 2], [1, 2, 3], [1, 3])
    with _saver(tmp_path, ranks, keep_last=1) as saver:
        _save(saver, 4, best_step=1)
    assert _steps(tmp_path, ranks) == [1, 4]
    assert not list(tmp_path.glob(".*"))


# --- its group and thread -----------------------------------------------------------------------


def _gloo_threads() -> int:
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)  # none but on Linux


def test_no_group_and_no_thread_stays_behind(tmp_path: Path, ranks: Ranks) -> None:
    groups, gloo = len(dist.distributed_c10d._world.pg_map), _gloo_threads()
    threads = set(threading.enumerate())
    for step in range(3):
        with _saver(tmp_path, ranks) as saver:
            _save(saver, step)
    assert len(dist.distributed_c10d._world.pg_map) == groups
    assert _gloo_threads() == gloo
    assert set(threading.enumerate()) == threads
