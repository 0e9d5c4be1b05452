"""Every user once an epoch, in one global order whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchrec_pt.config import DataConfig
from torchrec_pt.data import parts as parts_module
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.data.prepare import prepare
from torchrec_pt.distributed import Ranks

BATCH = 10
Row = tuple[int, int, list[int]]  # place in the batch, dense user id, history


def _ranks(rank: int, world_size: int) -> Ranks:
    return Ranks(rank, world_size, world_size, torch.device("cpu"))


def _steps(path: Path, world_size: int, epoch: int, start: int = 0) -> list[list[list[Row]]]:
    """Of each step and rank the real rows; checks what every rank has beside them."""
    of_ranks = []
    for rank in range(world_size):
        ranks = _ranks(rank, world_size)
        data = PreparedDataset.load(path, ranks)
        loader = HistoryLoader(data, batch_size=BATCH, max_length=5, seed=3, ranks=ranks)
        steps = list(loader.steps(epoch, start))
        assert len(steps) == loader.steps_per_epoch - start
        first = epoch * loader.steps_per_epoch + start
        assert [rows.noise.step for rows in steps] == list(range(first, first + len(steps)))
        of_ranks.append([(rows, data) for rows in steps])
    found = []
    for together in zip(*of_ranks, strict=True):
        assert len({rows.num_rows for rows, _ in together}) == 1  # padded to the same number
        assert min(int(rows.weight.sum()) for rows, _ in together) >= 0
        step = []
        for rows, data in together:
            items = [
                part.tolist()
                for part in rows.histories.values.split(rows.histories.lengths.tolist())
            ]
            step.append(
                [
                    (place, int(data.user_ids[user]), history)
                    for place, user, history in zip(
                        rows.noise.rows.tolist(), rows.users.tolist(), items, strict=True
                    )
                    if user >= 0
                ]
            )
            is_padding = rows.users < 0
            assert torch.equal(rows.weight, (~is_padding).float())
            assert not rows.histories.lengths[is_padding].any()
            of_users = data.history("train").select(rows.users[~is_padding])
            assert rows.histories.times is not None
            assert of_users.times is not None
            assert torch.equal(rows.histories.times, of_users.times)
        found.append(step)
    return found


def _whole(steps: list[list[list[Row]]]) -> list[list[Row]]:
    return [sorted(row for part in step for row in part) for step in steps]


@pytest.mark.parametrize("world_size", [2, 3, 5, 12, 40])
def test_the_global_batches_are_the_same_for_any_number_of_ranks(
    cycle: PreparedDataset, world_size: int
) -> None:
    for epoch in (0, 1):
        one, many = (_steps(cycle.path, num, epoch) for num in (1, world_size))
        assert _whole(many) == _whole(one)
        for step in many:  # no rank has more than its share, but for uneven parts
            assert max(map(len, step)) <= -(-BATCH // min(world_size, 12)) + 1


def test_every_user_is_trained_on_once_an_epoch_in_an_order_that_changes(
    cycle: PreparedDataset,
) -> None:
    orders = []
    for epoch in (0, 1):
        steps = _whole(_steps(cycle.path, 1, epoch))
        # The short batch comes anywhere in the epoch.
        assert sorted(map(len, steps)) == [7, 10, 10, 10]
        for step in steps:
            assert [place for place, _, _ in step] == list(range(len(step)))
        orders.append([user for step in steps for _, user, _ in step])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(cycle.num_users))
    assert orders[0] != orders[1]
    expected = cycle.history("train")
    for step in steps:
        for _, user, history in step:
            assert history == expected.select(torch.tensor([user])).values.tolist()


def test_an_epoch_goes_on_from_any_step(cycle: PreparedDataset) -> None:
    whole = _steps(cycle.path, 2, 1)
    assert _steps(cycle.path, 2, 1, start=3) == whole[3:]
    assert _steps(cycle.path, 2, 1, start=len(whole)) == []


def test_a_batch_has_histories_of_like_length(
    cycle: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [
        [min(len(history), 5) for _, _, history in step]
        for epoch in range(5)
        for step in _whole(_steps(cycle.path, 1, epoch))
    ]
    within = torch.stack([torch.tensor(step).float().var() for step in lengths]).mean()
    overall = torch.tensor([length for step in lengths for length in step]).float().var()
    assert within < 0.8 * overall


# --- parts --------------------------------------------------------------------------------------


def _log(path: Path, num_users: int, num_late: int) -> DataConfig:
    """Users of 1 to 3 early rows, then users who come after the training period."""
    rows = [(f"u{u}", i, 10 * u + i) for u in range(num_users) for i in range(1 + u % 3)]
    rows += [(f"late{u}", 0, 10**6 + u) for u in range(num_late)]
    path.write_text("user_id,item_id,t\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    split = {"rule": "temporal", "valid_from": 10**6, "test_from": 10**6 + 1}
    return DataConfig.model_validate(
        {"format": "csv", "path": path, "columns": {"timestamp": "t"}, "split": split}
    )


def test_ranks_share_the_parts_out_and_read_nothing_else(tmp_path: Path) -> None:
    prepare(_log(tmp_path / "log.csv", 50, 5), tmp_path / "out", seed=0)
    whole = PreparedDataset.load(tmp_path / "out")
    assert sum(part.num_users for part in whole.manifest.parts) == 55
    assert sum(part.num_rows for part in whole.manifest.parts) == len(whole.split)
    trained = [part.num_training for part in whole.manifest.parts]
    assert sum(trained) == 50
    assert max(trained[:12]) - min(trained[:12]) <= 1
    pieces = [PreparedDataset.load(tmp_path / "out", _ranks(rank, 3)) for rank in range(3)]
    users = torch.cat([piece.user_ids for piece in pieces])
    assert sorted(users.tolist()) == list(range(55))
    assert sum(len(piece.split) for piece in pieces) == len(whole.split)
    for piece in pieces:
        assert len(piece.user_ids) < 25
        expected = whole.interactions.select(piece.user_ids)
        assert torch.equal(piece.interactions.values, expected.values)
        assert torch.equal(piece.interactions.offsets, expected.offsets)
        names = whole.users["external_id"][piece.user_ids.tolist()].to_list()
        assert piece.users["external_id"].to_list() == names
        assert torch.equal(piece.item_counts, whole.item_counts)
    assert whole.external_user_ids().to_list() == whole.users["external_id"].to_list()


def test_a_rank_without_a_part_takes_part(tmp_path: Path) -> None:
    prepare(_log(tmp_path / "log.csv", 2, 1), tmp_path / "out", seed=0)
    data = PreparedDataset.load(tmp_path / "out", _ranks(3, 4))
    assert data.num_users == len(data.split) == data.users.height == 0
    loader = HistoryLoader(data, batch_size=2, max_length=5, seed=0, ranks=_ranks(3, 4))
    (rows,) = loader.steps(0)
    assert rows.weight.tolist() == [0]
    assert rows.histories.lengths.tolist() == [0]


def test_larger_data_has_more_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "USERS_PER_PART", 4)
    prepare(_log(tmp_path / "log.csv", 200, 0), tmp_path / "out", seed=0)
    parts = PreparedDataset.load(tmp_path / "out").manifest.parts
    assert len(parts) == 48
    assert min(part.num_users for part in parts) >= 4
