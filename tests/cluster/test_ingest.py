"""Ray Data prepares the dataset that the local engine prepares, to the byte."""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import ray

from cluster.ingest import Sizes, prepare_on_ray
from tests.conftest import tiny_config
from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import load_manifest
from torchrec_pt.data.prepare import prepare

# The smallest that Ray takes.
STORE_BYTES = 75 * 2**20
# So that a small log has several blocks and partitions, some of them without rows.
SMALL = Sizes(block=300, partition=150)

TIMES = {"timestamp": "timestamp", "rating": "rating"}
FEATURES = [
    {"column": "hour", "of": "interaction", "kind": "categorical"},
    {"column": "price", "of": "interaction", "kind": "numeric"},
    {"column": "place", "of": "interaction", "kind": "vector", "separator": " "},
    {"column": "words", "of": "interaction", "kind": "text"},
    {"column": "age", "of": "user", "kind": "numeric"},
    {"column": "tags", "of": "item", "kind": "categorical", "separator": "|"},
]
CORE = {"user_core": 4, "item_core": 8}
CASES: dict[str, dict[str, Any]] = {
    "csv with features": {"format": "csv", "columns": TIMES, "features": FEATURES},
    "tsv, drawn, no times": {"format": "tsv", "split": {"rule": "ratio", "valid": 0.2}},
    "files, drawn in the core": {
        "format": "csv",
        "path": "many",
        "columns": TIMES,
        "filters": {**CORE, "min_rating": 2, "duplicates": "last"},
        "split": {"rule": "ratio"},
    },
    "files by user": {
        "format": "csv",
        "path": "many",
        "columns": TIMES,
        "features": FEATURES,
        "filters": {"duplicates": "first"},
        "split": {"rule": "ratio", "over": "user"},
    },
    "parquet, impressions, temporal": {
        "format": "parquet",
        "columns": {**TIMES, "label": "label"},
        "features": FEATURES[:3],
        "split": {"rule": "temporal", "valid_from": 200, "test_from": 250},
    },
    "parquet, given": {
        "format": "parquet",
        "columns": {**TIMES, "split": "split"},
        "filters": CORE,
        "split": {"rule": "given"},
    },
    "sequences": {"format": "sequence", "path": "log.txt"},
    "recbole, with side files and items unseen": {
        "format": "recbole",
        "path": "log.inter",
        "columns": TIMES,
        "features": [{"column": "tags", "of": "item", "kind": "categorical"}],
        "keep_unseen_items": True,
    },
}


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
    """The same log in several formats; times tie, users and items have long tails."""
    folder = tmp_path_factory.mktemp("logs")
    draw = random.Random(0)
    rows = [
        {
            "user_id": f"u{int(90 * draw.random() ** 2)}",
            "item_id": int(70 * draw.random() ** 2),
            "rating": draw.randint(1, 5),
            "timestamp": draw.randint(0, 300),
            "label": draw.randint(0, 1),
            "split": draw.choice(["train", "train", "valid", "test"]),
            "hour": draw.choice(["7", "8", None]),
            "price": draw.choice([None, str(draw.random())]),
            "place": f"{draw.random()} {draw.random()}",
            "words": draw.choice(["some words", None]),
            "age": str(draw.randint(10, 90)),
            "tags": draw.choice(["a|b", "b", "c"]),
        }
        for _ in range(1200)
    ]
    frame = pl.DataFrame(rows)
    frame.write_csv(folder / "log.csv")
    frame.write_csv(folder / "log.tsv", separator="\t")
    frame.write_parquet(folder / "log.parquet", row_group_size=250)
    (folder / "many").mkdir()
    for number, begin in enumerate(range(0, frame.height, 400)):
        frame.slice(begin, 400).write_csv(folder / "many" / f"{number}.csv")
    users = frame.group_by("user_id", maintain_order=True).agg("item_id")
    lines = [" ".join([user, *map(str, items)]) for user, items in users.rows()]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    inter = frame.select("user_id", "item_id", "rating", "timestamp").rows()
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    _write_lines(folder / "log.inter", header, inter)
    items = [(item, f"t{item % 4} t9") for item in range(80)]
    _write_lines(folder / "log.item", "item_id:token\ttags:token_seq", items)
    return folder


def _write_lines(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    lines = ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n")


def config_of(logs: Path, run_dir: Path, **data: Any) -> RunConfig:
    path = logs / data.pop("path", f"log.{data['format']}")
    return tiny_config(logs, data={"path": path, **data}).model_copy(update={"run_dir": run_dir})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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


def spoil(logs: Path, name: str, folder: Path) -> dict[str, Any]:
    """A log, or a configuration, that cannot be used."""
    lines = (logs / "log.csv").read_text().splitlines()
    match name:
        case "ragged":
            lines[700] = "u1,2"
        case "no number":
            lines[700] = lines[700].replace(",", ",x", 2).replace("x", "", 1)
        case "unknown split":
            frame = pl.read_csv(logs / "log.csv", infer_schema=False)
            bad = pl.when(pl.int_range(pl.len()) % 97 == 5).then(pl.lit("late")).otherwise("split")
            frame.with_columns(split=bad).write_csv(folder / "log.csv")
            return {"split": {"rule": "given"}, "columns": {**TIMES, "split": "split"}}
        case "nothing left":
            return {"filters": {"user_core": 10_000}}
        case "no training":
            return {"split": {"rule": "temporal", "valid_from": -2, "test_from": -1}}
        case "lengths of vectors":
            lines[700] = lines[700].replace(" ", " 1 ", 1)
            (folder / "log.csv").write_text("\n".join(lines) + "\n")
            return {"features": [FEATURES[2]]}
        case "page of parquet":
            # Of a column that nothing looks at before the rows are read.
            shutil.copy(logs / "log.parquet", folder)
            group = pq.ParquetFile(folder / "log.parquet").metadata.row_group(2)
            columns = [group.column(index) for index in range(group.num_columns)]
            words = next(column for column in columns if column.path_in_schema == "words")
            with (folder / "log.parquet").open("r+b") as file:
                file.seek(words.dictionary_page_offset or words.data_page_offset)
                file.write(b"\xff" * words.total_compressed_size)
            return {"format": "parquet", "features": [FEATURES[3]]}
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return {}


@pytest.mark.parametrize(
    "name",
    [
        "ragged",
        "no number",
        "unknown split",
        "nothing left",
        "no training",
        "lengths of vectors",
        "page of parquet",
    ],
)
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
