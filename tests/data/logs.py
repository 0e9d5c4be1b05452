"""A log in every way that an engine may be asked to prepare it, and with mistakes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from tests.conftest import tiny_config
from torchrec_pt.config import RunConfig

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
# Of `spoil`.
MISTAKES = (
    "ragged",
    "no number",
    "unknown split",
    "nothing left",
    "no training",
    "lengths of vectors",
    "page of parquet",
)


def write_logs(folder: Path) -> None:
    """The same log in several formats; times tie, users and items have long tails."""
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


def _write_lines(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    lines = ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n")


def config_of(logs: Path, run_dir: Path, **data: Any) -> RunConfig:
    path = logs / data.pop("path", f"log.{data['format']}")
    return tiny_config(logs, data={"path": path, **data}).model_copy(update={"run_dir": run_dir})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
