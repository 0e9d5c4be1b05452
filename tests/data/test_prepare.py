"""The prepared dataset: filters, splits, ids, features; and it is there whole or not at all."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_pt.config import DataConfig, LeaveOneOutSplit, RatioSplit
from torchrec_pt.data.atomic import exclusive
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import Manifest, load_manifest, notices, require_rows
from torchrec_pt.data.prepare import prepare
from torchrec_pt.data.splits import TEST, VALID, assign_splits, fewest_to_evaluate

COLUMNS = {"timestamp": "timestamp", "rating": "rating"}


def config_of(path: Path, **data: Any) -> DataConfig:
    return DataConfig.model_validate({"format": "csv", "path": path, "columns": COLUMNS, **data})


def write_log(path: Path, rows: list[tuple[Any, ...]], more: str = "") -> Path:
    """Rows of user, item, rating, timestamp and what `more` names (",color")."""
    lines = ["user_id,item_id,rating,timestamp" + more]
    lines += [",".join(str(cell) for cell in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def external_rows(out: Path) -> pl.DataFrame:
    """Interactions with the external ids put back."""
    rows = pl.read_parquet(out / "interactions.parquet")
    users = pl.read_parquet(out / "users.parquet")["external_id"]
    items = pl.read_parquet(out / "items.parquet")["external_id"]
    return rows.with_columns(user=users.gather(rows["user"]), item=items.gather(rows["item"]))


def prepare_rows(rows: list[tuple[Any, ...]], seed: int = 0, **data: Any) -> pl.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        path = write_log(Path(folder) / "log.csv", rows)
        prepare(config_of(path, **data), Path(folder) / "out", seed)
        return external_rows(Path(folder) / "out")


# --- splits -------------------------------------------------------------------------------------

# The rating is the row's number, by which a test finds the row again; times tie often.
logs = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=40
).map(lambda rows: [(user, item, n, time) for n, (user, item, time) in enumerate(rows)])
examples = settings(max_examples=25, deadline=None)


def by_user(rows: list[tuple[Any, ...]]) -> dict[int, list[int]]:
    """Row numbers of each user in time order, ties as in the file."""
    users: dict[int, list[int]] = defaultdict(list)
    for user, _, number, _ in sorted(rows, key=lambda row: row[3]):
        users[user].append(number)
    return users


def codes(prepared: pl.DataFrame) -> dict[int, int]:
    """Split by row number; proves on the way that each row is there once."""
    numbers = [int(number) for number in prepared["rating"]]
    assert len(set(numbers)) == len(numbers)
    return dict(zip(numbers, prepared["split"], strict=True))


@examples
@given(rows=logs)
def test_leave_one_out_takes_the_last_two_of_users_with_three(rows: list[Any]) -> None:
    expected: dict[int, int] = {}
    for numbers in by_user(rows).values():
        tail = [1, 2] if len(numbers) >= 3 else []
        split = [0] * (len(numbers) - len(tail)) + tail
        expected.update(zip(numbers, split, strict=True))
    assert codes(prepare_rows(rows)) == expected


@examples
@given(rows=logs, valid_from=st.integers(1, 4), span=st.integers(1, 3))
def test_temporal_split_goes_by_the_dates_alone(
    rows: list[Any], valid_from: int, span: int
) -> None:
    test_from = valid_from + span
    split = {"rule": "temporal", "valid_from": valid_from, "test_from": test_from}
    expected = {n: (time >= valid_from) + (time >= test_from) for _, _, n, time in rows}
    if 0 in expected.values():
        assert codes(prepare_rows(rows, split=split)) == expected
    else:
        with pytest.raises(DataError, match="no training row"):
            prepare_rows(rows, split=split)


@examples
@given(rows=logs, seed=st.integers(0, 2**32 - 1))
def test_ratio_over_all_gives_each_part_its_size_and_repeats_by_seed(
    rows: list[Any], seed: int
) -> None:
    split = {"rule": "ratio", "valid": 0.2, "test": 0.1}
    found = codes(prepare_rows(rows, seed=seed, split=split))
    assert found == codes(prepare_rows(rows, seed=seed, split=split))
    sizes = Counter(found.values())
    assert len(found) == len(rows)
    assert (sizes[1], sizes[2]) == (2 * len(rows) // 10, len(rows) // 10)


def test_ratio_over_all_depends_on_the_seed() -> None:
    rows = [(1, item, item, 0) for item in range(100)]
    split = {"rule": "ratio", "over": "all"}
    assert codes(prepare_rows(rows, seed=1, split=split)) != codes(
        prepare_rows(rows, seed=2, split=split)
    )


@examples
@given(rows=logs)
def test_ratio_over_user_takes_the_last_part_of_each_user(rows: list[Any]) -> None:
    split = {"rule": "ratio", "valid": 0.3, "test": 0.2, "over": "user"}
    expected: dict[int, int] = {}
    for numbers in by_user(rows).values():
        num_valid, num_test = 3 * len(numbers) // 10, 2 * len(numbers) // 10
        num_train = len(numbers) - num_valid - num_test
        part = [0] * num_train + [1] * num_valid + [2] * num_test
        expected.update(zip(numbers, part, strict=True))
    assert codes(prepare_rows(rows, split=split)) == expected


def test_given_split_is_taken_as_given(tmp_path: Path) -> None:
    rows = [(1, 1, 0, 0, "test"), (1, 2, 1, 1, "train"), (2, 1, 2, 2, "valid")]
    path = write_log(tmp_path / "log.csv", rows, more=",fold")
    data = {"columns": {**COLUMNS, "split": "fold"}, "split": {"rule": "given"}}
    prepare(config_of(path, **data), tmp_path / "out", seed=0)
    assert codes(external_rows(tmp_path / "out")) == {0: 2, 1: 0, 2: 1}


def test_rows_are_sorted_by_user_time_and_place_in_the_file() -> None:
    # User 3 comes first: the first row of user 7 is valid.
    rows = [(7, 1, 0, 5), (3, 2, 1, 9), (7, 3, 2, 1), (7, 4, 3, 5), (3, 5, 4, 9)]
    assert prepare_rows(rows)["rating"].to_list() == [1, 4, 2, 0, 3]


@pytest.mark.parametrize("rule", ["leave_one_out", "ratio"])
def test_the_only_interaction_of_a_user_trains(tmp_path: Path, rule: str) -> None:
    (tmp_path / "log.txt").write_text("a 1\nb 1 2 3 4 5 6 7 8 9 10\nc 2\n")
    split = {"rule": rule} if rule == "leave_one_out" else {"rule": rule, "over": "user"}
    data = {"format": "sequence", "path": tmp_path / "log.txt", "split": split}
    manifest = prepare(DataConfig.model_validate(data), tmp_path / "out", seed=0)
    assert (manifest.num_users, manifest.num_valid, manifest.num_test) == (3, 1, 1)
    histories = PreparedDataset.load(tmp_path / "out").history("train")
    assert histories.lengths.tolist() == [1, 8, 1]


@examples
@given(
    n=st.integers(1, 40),
    valid=st.sampled_from([0.05, 0.1, 0.29, 0.5]),
    test=st.sampled_from([0, 0.07, 0.1, 0.3]),
)
def test_the_fewest_to_evaluate_are_just_enough(n: int, valid: float, test: float) -> None:
    ratio = RatioSplit(rule="ratio", over="user", valid=valid, test=test)
    rows = pl.DataFrame({"user": [0] * n + [1] * 40, "row": range(n + 40)})
    for split in (ratio, LeaveOneOutSplit()):
        found = assign_splits(rows, split, 0).filter(pl.col("user") == 0)["split"]
        wanted = VALID if split is ratio and not test else TEST
        assert (wanted in found) == (n >= fewest_to_evaluate(split))


# --- filters ------------------------------------------------------------------------------------


@examples
@given(rows=logs, user_core=st.integers(1, 4), item_core=st.integers(1, 4))
def test_k_core_matches_dropping_until_nothing_changes(
    rows: list[Any], user_core: int, item_core: int
) -> None:
    kept, before = rows, -1
    while len(kept) != before:
        before = len(kept)
        users, items = Counter(r[0] for r in kept), Counter(r[1] for r in kept)
        kept = [r for r in kept if users[r[0]] >= user_core and items[r[1]] >= item_core]
    filters = {"user_core": user_core, "item_core": item_core}
    if kept:
        assert set(codes(prepare_rows(rows, filters=filters))) == {row[2] for row in kept}
    else:
        with pytest.raises(DataError, match=f"nothing is left of {len(rows)} rows"):
            prepare_rows(rows, filters=filters)


def test_rating_goes_before_duplicates_before_core(tmp_path: Path) -> None:
    rows = [(1, 1, 2, 0), (1, 1, 5, 1), (1, 2, 5, 2), (1, 1, 4, 3), (2, 1, 4, 4), (2, 2, 1, 5)]
    filters = {"min_rating": 4, "duplicates": "first", "user_core": 2}
    path = write_log(tmp_path / "log.csv", rows)
    manifest = prepare(config_of(path, filters=filters), tmp_path / "out", seed=0)
    dropped = manifest.dropped
    assert (dropped.rating, dropped.duplicates, dropped.core) == (2, 1, 1)
    kept = external_rows(tmp_path / "out").select("user", "item", "timestamp").rows()
    assert kept == [(1, 1, 1.0), (1, 2, 2.0)]


@pytest.mark.parametrize(
    ("duplicates", "kept"), [("keep", [1, 4, 2, 3]), ("first", [1, 2]), ("last", [4, 3])]
)
def test_duplicated_interactions_are_kept_or_dropped_as_told(
    duplicates: str, kept: list[int]
) -> None:
    # The first two rows are the same but for the rating, which names them.
    rows = [(1, 1, 1, 5), (1, 1, 4, 5), (1, 2, 2, 6), (1, 2, 3, 9)]
    prepared = prepare_rows(rows, filters={"duplicates": duplicates})
    assert prepared["rating"].to_list() == kept


@examples
@given(rows=logs)
def test_the_manifest_counts_what_deserves_a_notice(rows: list[Any]) -> None:
    rows = [*rows, *((0, item, 0, item) for item in range(3))]
    with tempfile.TemporaryDirectory() as folder:
        path = write_log(Path(folder) / "log.csv", rows)
        manifest = prepare(config_of(path), Path(folder) / "out", 0)
    num_short = sum(num < 3 for num in Counter(row[0] for row in rows).values())
    num_repeats = len(rows) - len({row[:2] for row in rows})
    assert (manifest.num_short_users, manifest.num_repeats) == (num_short, num_repeats)
    assert len(notices(manifest)) == (num_short > 0) + (num_repeats > 0)


def test_notices_say_how_many_and_which_key_changes_it(tmp_path: Path) -> None:
    rows = [(1, item, 1, item) for item in range(4)] + [(1, 3, 1, 9), (2, 1, 1, 1), (2, 1, 1, 1)]
    path = write_log(tmp_path / "log.csv", rows)
    assert notices(prepare(config_of(path), tmp_path / "out", seed=0)) == [
        "1 of 2 users have fewer than 3 interactions: they train but are not evaluated; "
        "data.filters.user_core = 3 drops them",
        "2 interactions repeat an earlier one of the same user and item: kept; "
        'data.filters.duplicates = "first" keeps one',
    ]
    filters = {"duplicates": "first", "user_core": 3}
    assert not notices(prepare(config_of(path, filters=filters), tmp_path / "out", seed=0))
    temporal = {"rule": "temporal", "valid_from": 2, "test_from": 3}
    (only,) = notices(prepare(config_of(path, split=temporal), tmp_path / "out", seed=0))
    assert "repeat" in only


NOBODY = "leave_one_out needs users with 3 interactions or more, none of 2 has them; add"


@pytest.mark.parametrize(
    ("split", "validation", "test"),
    [
        ({"rule": "leave_one_out"}, NOBODY, NOBODY),
        ({"rule": "ratio", "over": "user", "valid": 0.5, "test": 0}, None, "no test row of 3;"),
        ({"rule": "ratio", "over": "user"}, "none of 2 has them", "with 10 interactions or more"),
        ({"rule": "ratio", "valid": 0, "test": 0.4}, "no validation row of 3; change", None),
        ({"rule": "temporal", "valid_from": 1, "test_from": 2}, None, None),
    ],
)
def test_what_a_split_leaves_nothing_for_is_named(
    tmp_path: Path, split: dict[str, Any], validation: str | None, test: str | None
) -> None:
    path = write_log(tmp_path / "log.csv", [(1, 1, 1, 0), (1, 2, 1, 1), (2, 2, 1, 2)])
    manifest = prepare(config_of(path, split=split), tmp_path / "out", seed=0)
    for part, expected in (("validation", validation), ("test", test)):
        if expected is None:
            require_rows(manifest, part)
        else:
            with pytest.raises(DataError, match=f"^data.split: .*{expected}"):
                require_rows(manifest, part)


# --- ids and features ---------------------------------------------------------------------------


def test_dense_ids_go_by_first_appearance_and_training_count(tmp_path: Path) -> None:
    rows = [
        ("v", "late", 1, 9), ("u", "b", 1, 1), ("u", "a", 1, 2), ("u", "late", 1, 3),
        ("u", "late", 1, 4), ("w", "a", 1, 5), ("v", "c", 1, 6),
    ]  # fmt: skip
    path = write_log(tmp_path / "log.csv", rows)
    prepare(config_of(path), tmp_path / "out", seed=0)
    users = pl.read_parquet(tmp_path / "out" / "users.parquet")
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert users["external_id"].to_list() == ["v", "u", "w"]
    # Of "late" only the row of v trains: those of u are valid and test.
    assert items.rows() == [("a", 2), ("late", 1), ("b", 1), ("c", 1)]


FEATURES = [
    {"column": "age", "of": "user", "kind": "numeric"},
    {"column": "tags", "of": "item", "kind": "categorical", "separator": "|"},
    {"column": "vector", "of": "item", "kind": "vector", "separator": " "},
    {"column": "hour", "of": "interaction", "kind": "numeric"},
    {"column": "device", "of": "interaction", "kind": "categorical"},
]


def write_featured_log(path: Path, held_out: list[tuple[int, tuple[Any, ...]]]) -> Path:
    """Ten training rows by the `given` split, each `held_out` row before the one it names."""
    tags = {1: "x|y", 2: "y", 3: ""}
    rows: list[tuple[Any, ...]] = []
    for n in range(10):
        user, item = n % 2 + 1, n % 3 + 1
        rows.append((user, item, n % 5, n, "train", 20 * user, tags[item], f"{item} 0", n, "tv"))
    for place, row in sorted(held_out, reverse=True):
        rows.insert(place, row)
    return write_log(path, rows, more=",fold,age,tags,vector,hour,device")


def featured_config(path: Path) -> DataConfig:
    columns = {**COLUMNS, "split": "fold"}
    return config_of(path, columns=columns, split={"rule": "given"}, features=FEATURES)


def what_training_sees(out: Path) -> dict[str, Any]:
    """Of users and items only those that train: the others come after them."""
    data = PreparedDataset.load(out)
    history = data.history("train")
    num_users, num_items = int((history.lengths > 0).sum()), int((data.item_counts > 0).sum())
    assert (history.lengths[:num_users] > 0).all()
    return {
        "users": data.users.head(num_users).rows(),
        "items": data.items.head(num_items).rows(),
        "features": data.manifest.features,
        "vocabulary": pl.read_parquet(out / "vocabulary.parquet").rows(),
        "history": (history.values.tolist(), history.lengths[:num_users].tolist()),
    }


def test_valid_and_test_leave_no_trace_in_what_training_sees(tmp_path: Path) -> None:
    # Users 1 and 2 and items 1 to 3 train, with other features than here; items 2 and 3 equally
    # often, 2 first.
    one = [
        (0, (3, 3, 1, 21, "test", 1, "w", "9 9", 2, "radio")),
        (4, (1, 4, 5, 20, "valid", 2, "z", "4 0", 1, "tv")),
    ]
    other = [
        (0, (2, 3, 1, 30, "test", 3, "v|w", "8 8", 99, "phone")),
        (0, (1, 4, 2, 32, "test", 4, "z", "4 0", 55, "car")),
        (5, (3, 2, 4, 31, "valid", 1, "u", "7 7", 77, "tv")),
        (10, (1, 1, 4, 31, "valid", 5, "", "6 6", 77, "tv")),
    ]
    seen = []
    for name, held_out in (("none", []), ("one", one), ("other", other)):
        path = write_featured_log(tmp_path / f"{name}.csv", held_out)
        prepare(featured_config(path), tmp_path / name, seed=0)
        seen.append(what_training_sees(tmp_path / name))
    assert seen[0] == seen[1] == seen[2]
    assert [(item, count) for item, count, *_ in seen[0]["items"]] == [(1, 4), (2, 3), (3, 3)]
    assert seen[0]["users"] == [(1, 20.0), (2, 40.0)]
    # What never trains comes last and is described by its own first row.
    last = PreparedDataset.load(tmp_path / "other")
    assert last.items.rows()[3:] == [(4, 0, ["z"], [4.0, 0.0])]
    assert last.users.rows()[2:] == [(3, 1.0)]


featured_logs = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.integers(1, 5),
        st.just(1),
        st.integers(0, 4),
        st.sampled_from(["train", "train", "valid", "test"]),
        st.integers(0, 9),
        st.sampled_from(["x", "y", "x|y", ""]),
        st.sampled_from(["1 0", "2 3"]),
        st.integers(0, 9),
        st.sampled_from(["tv", "radio", ""]),
    ),
    min_size=1,
    max_size=25,
).filter(lambda rows: any("train" in row for row in rows))


@settings(examples, max_examples=12)
@given(rows=featured_logs)
def test_training_sees_what_it_would_without_held_out_rows(rows: list[Any]) -> None:
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("all", "train"):
            chosen = [row for row in rows if name == "all" or "train" in row]
            path = Path(folder) / f"{name}.csv"
            write_log(path, chosen, more=",fold,age,tags,vector,hour,device")
            prepare(featured_config(path), Path(folder) / name, seed=0)
            seen.append(what_training_sees(Path(folder) / name))
    assert seen[0] == seen[1]


def test_features_are_typed_and_summarized(tmp_path: Path) -> None:
    held_out = [(10, (3, 4, 5, 20, "test", 60, "z", "4 0", 1000, "radio"))]
    path = write_featured_log(tmp_path / "log.csv", held_out)
    manifest = prepare(featured_config(path), tmp_path / "out", seed=0)
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert items["tags"].to_list() == [["x", "y"], ["y"], None, ["z"]]
    assert items.schema["vector"] == pl.List(pl.Float32)
    age, tags, vector, hour, device = manifest.features
    assert (age.mean, age.std) == (30, 10)
    assert (tags.num_values, device.num_values) == (3, 2)
    assert vector.dim == 2
    assert hour.mean == 4.5
    vocabulary = pl.read_parquet(tmp_path / "out" / "vocabulary.parquet")
    assert vocabulary.rows() == [
        ("item", "tags", "y", 1),
        ("item", "tags", "x", 2),
        ("interaction", "device", "tv", 1),
    ]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [(["1 2", "3"], "one length, found 1 and 2"), (["1 2", "3 x"], "finite numbers")],
)
def test_bad_vectors_are_refused(tmp_path: Path, cells: list[str], expected: str) -> None:
    rows = [(1, item, 1, 1, cell) for item, cell in enumerate(cells)]
    path = write_log(tmp_path / "log.csv", rows, more=",vector")
    features = [{"column": "vector", "of": "item", "kind": "vector", "separator": " "}]
    with pytest.raises(DataError, match=expected):
        prepare(config_of(path, features=features), tmp_path / "out", seed=0)


# --- errors of the config -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"columns": {}, "filters": {"min_rating": 3}}, "data.columns.rating is not set"),
        (
            {"columns": {}, "split": {"rule": "temporal", "valid_from": 1, "test_from": 2}},
            "data.columns.timestamp is not set",
        ),
        ({"split": {"rule": "given"}}, "data.columns.split is not set"),
        (
            {"split": {"rule": "given"}, "columns": {"split": "rating"}},
            '"train", "valid" or "test", found "1" in 2 rows',
        ),
        ({"filters": {"user_core": 9}}, "nothing is left of 2 rows.* item_core 2"),
    ],
)
def test_impossible_configs_are_refused(
    tmp_path: Path, data: dict[str, Any], expected: str
) -> None:
    path = write_log(tmp_path / "log.csv", [(1, 1, 1, 1), (1, 2, 1, 2)])
    with pytest.raises(DataError, match=expected):
        prepare(config_of(path, **data), tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_parquet_with_broken_pages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": range(9999), "item_id": range(9999)}).write_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[:50] + b"\xff" * 3000 + content[3050:])
    config = DataConfig.model_validate({"format": "parquet", "path": path})
    with pytest.raises(DataError, match=r"log\.parquet: cannot be read"):
        prepare(config, tmp_path / "out", seed=0)


@pytest.mark.parametrize("of", ["item", "interaction"])
def test_the_broken_file_of_a_folder_is_named(tmp_path: Path, of: str) -> None:
    cells = {"user_id": [n % 9 for n in range(999)], "item_id": range(999)}
    table = pl.DataFrame({**cells, "colour": [f"c{n * 7919 % 1009}" for n in range(999)]})
    for name in "ab":
        table.write_parquet(tmp_path / f"{name}.parquet", compression="zstd")
    content = (tmp_path / "b.parquet").read_bytes()
    # The last page is one of the last column, which no check of ids and numbers reads.
    page = content.rindex(b"\x28\xb5\x2f\xfd") + 4
    (tmp_path / "b.parquet").write_bytes(content[:page] + b"\xff" * 9 + content[page + 9 :])
    features = [{"column": "colour", "of": of, "kind": "categorical"}]
    raw = {"format": "parquet", "path": tmp_path, "features": features}
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read"):
        prepare(DataConfig.model_validate(raw), tmp_path / "out", seed=0)


# --- whole or not at all ------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log.csv", [(1, item, 5, item) for item in range(20)])


def snapshot(out: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}


def test_same_fingerprint_is_not_written_again(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "deep" / "out"
    first = prepare(config_of(log), out, seed=0)
    before = snapshot(out)
    moved = config_of(log, prepared="elsewhere")
    assert prepare(moved, out, seed=0) == first == load_manifest(out)
    assert snapshot(out) == before


@pytest.mark.parametrize("change", ["seed", "config", "source"])
def test_any_other_fingerprint_replaces_the_dataset(tmp_path: Path, log: Path, change: str) -> None:
    out = tmp_path / "out"
    first = prepare(config_of(log), out, seed=0)
    if change == "source":
        write_log(log, [(1, item, 5, item) for item in range(21)])
    filters = {"item_core": 1, "duplicates": "last"} if change == "config" else {}
    second = prepare(config_of(log, filters=filters), out, seed=int(change == "seed"))
    assert second.fingerprint != first.fingerprint
    assert load_manifest(out) == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]


def test_a_dataset_of_another_version_is_replaced(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(config_of(log), out, seed=0)
    text = (out / "manifest.json").read_text().replace('"format_version": 2', '"format_version": 1')
    (out / "manifest.json").write_text(text)
    assert prepare(config_of(log), out, seed=0) == manifest == load_manifest(out)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is no prepared dataset"):
        prepare(config_of(log), out, seed=0)
    (out / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(DataError, match="is no manifest of a prepared dataset"):
        prepare(config_of(log), out, seed=0)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_leftovers_of_a_killed_run_go_away(tmp_path: Path, log: Path) -> None:
    for leftover in (".out.partial", ".out.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "users.parquet").write_text("half")
    prepare(config_of(log), tmp_path / "out", seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]


def test_a_second_run_on_the_same_folder_is_refused_while_one_is_at_work(
    tmp_path: Path, log: Path
) -> None:
    out = tmp_path / "out"
    with exclusive(out), pytest.raises(DataError, match=r"out: must have one writer.*; wait"):
        prepare(config_of(log), out, seed=0)
    assert not out.exists()
    prepare(config_of(log), out, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]


def test_the_lock_of_a_killed_run_does_not_stay(tmp_path: Path, log: Path) -> None:
    code = "import os, pathlib, sys; from torchrec_pt.data.atomic import exclusive\n"
    code += "with exclusive(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", code, str(out)]).returncode == -9
    assert (tmp_path / ".out.lock").exists()
    prepare(config_of(log), out, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]


def test_runs_at_once_leave_one_whole_dataset(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"

    def run(_: int) -> str:
        try:
            return prepare(config_of(log), out, seed=0).fingerprint
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(run, range(8)))
    answers.remove(load_manifest(out).fingerprint)
    assert all("must have one writer" in answer for answer in answers)
    PreparedDataset.load(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]


@pytest.mark.parametrize("had_dataset", [False, True])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, log: Path, had_dataset: bool
) -> None:
    out = tmp_path / "out"
    before: Manifest | None = prepare(config_of(log), out, seed=1) if had_dataset else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses any file past this size, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(DataError, match=r"cannot be written.*; check free space"):
            prepare(config_of(log), out, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv"] + ["out"] * had_dataset
    if before:
        assert load_manifest(out) == before


def test_an_interrupt_leaves_nothing(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config_of(log), tmp_path / "out", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("cut manifest", "cannot be read"),
        ("other version", "format version must be"),
        ("missing key", "broken at fingerprint"),
        ("no file", r"items\.parquet: must have \d+ bytes, is missing"),
        ("cut file", r"items\.parquet: must have \d+ bytes, has 10"),
    ],
)
def test_damaged_datasets_are_not_loaded(
    tmp_path: Path, log: Path, damage: str, expected: str
) -> None:
    out = tmp_path / "out"
    prepare(config_of(log), out, seed=0)
    manifest, items = out / "manifest.json", out / "items.parquet"
    text = manifest.read_text()
    match damage:
        case "cut manifest":
            manifest.write_text(text[:100])
        case "other version":
            manifest.write_text(text.replace('"format_version": ', '"format_version": 9'))
        case "missing key":
            manifest.write_text(text.replace("fingerprint", "print"))
        case "no file":
            items.unlink()
        case "cut file":
            items.write_bytes(items.read_bytes()[:10])
    with pytest.raises(DataError, match=expected):
        PreparedDataset.load(out)


# --- real data ----------------------------------------------------------------------------------


@pytest.mark.skipif("TORCHREC_PT_ML100K" not in os.environ, reason="TORCHREC_PT_ML100K not set")
def test_movielens_100k_has_its_known_counts(tmp_path: Path) -> None:
    config = DataConfig.model_validate(
        {"format": "movielens", "path": os.environ["TORCHREC_PT_ML100K"], "columns": COLUMNS}
    )
    manifest = prepare(config, tmp_path / "out", seed=0)
    assert (manifest.num_users, manifest.num_items) == (943, 1682)
    assert (manifest.num_interactions, manifest.num_test) == (100_000, 943)
