"""Files of embeddings: each format read back by somebody else's reader, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from pydantic import ValidationError

from tests.conftest import tiny_config, write_cycle
from torchrec_pt import cli, export_embeddings, pipeline
from torchrec_pt.config import ExportConfig, IndexConfig, RunConfig
from torchrec_pt.config_file import ConfigError, load_config
from torchrec_pt.data.errors import DataError
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.export.embeddings import Asked, read_ids, write_embeddings
from torchrec_pt.export.formats import WRITERS
from torchrec_pt.export.rounding import RoundingMeter, round_to
from torchrec_pt.files import WriteError
from torchrec_pt.runs import load_result
from torchrec_pt.served import Served, load_served

UNTRAINED = {"epochs": 0, "batch_size": 10, "objectives": [{"name": "masked_item"}]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """Of external ids that are strings and integers; the model has its initial values."""
    found = {}
    for name in ("strings", "integers"):
        folder = tmp_path_factory.mktemp(name)
        write_cycle(folder / "log.tsv")
        if name == "integers":
            text = (folder / "log.tsv").read_text()
            lines = [line.removeprefix("u").replace("\ti", "\t", 1) for line in text.split("\n")]
            header = lines[0] if lines[0].startswith("user_id") else f"u{lines[0]}"
            lines[0] = header.replace("\ttem_id", "\titem_id")
            (folder / "log.tsv").write_text("\n".join(lines))
        found[name] = tiny_config(folder, pretrain=UNTRAINED)
        pipeline.prepare(found[name])
        pipeline.pretrain(found[name])
    return found


@pytest.fixture(scope="module")
def all_served(runs: dict[str, RunConfig]) -> Iterator[dict[str, Served]]:
    """The runs, loaded once."""
    with joined_ranks() as ranks:
        yield {name: load_served(config.run_dir, ranks) for name, config in runs.items()}


@pytest.fixture
def served(all_served: dict[str, Served]) -> Served:
    return all_served["strings"]


def _export(
    served: Served,
    what: str,
    *,
    format: str = "parquet",
    dtype: str = "float32",
    index: IndexConfig | None = None,
    ids: list[Any] | None = None,
    out: Path,
) -> Path:
    """As `export_embeddings`, of a model that is loaded already."""
    asked = Asked(what, format, dtype, index or IndexConfig(), ids, out)  # type: ignore[arg-type]
    write_embeddings(served, asked)
    return out / f"{what}.{format}"


def _expected(served: Served, what: str, out: Path) -> tuple[list[Any], np.ndarray]:
    """Ids and vectors, by NumPy's reader."""
    path = _export(served, what, format="npy", out=out)
    return _of_npy(path)


def _of_npy(path: Path) -> tuple[list[Any], np.ndarray]:
    what = path.stem
    ids = np.load(path.with_name(f"{what}_ids.npy"), allow_pickle=False)
    return ids.tolist(), np.load(path, allow_pickle=False)


def _ids_beside(path: Path) -> list[Any]:
    beside = path.with_name(f"{path.name}.ids.parquet")
    return pl.read_parquet(beside)["id"].to_list() if beside.exists() else []


def _of_parquet(path: Path) -> tuple[list[Any], np.ndarray]:
    table = pl.read_parquet(path)
    return table["id"].to_list(), table["embedding"].to_numpy()


def _of_safetensors(path: Path) -> tuple[list[Any], np.ndarray]:
    tensors = safetensors.numpy.load_file(path)
    ids = tensors["ids"].tolist() if "ids" in tensors else _ids_beside(path)
    return ids, tensors["embeddings"]


def _of_faiss(path: Path) -> tuple[list[Any], np.ndarray]:
    index = faiss.read_index(str(path))
    ids = _ids_beside(path)
    if ids:
        return ids, index.reconstruct_n(0, index.ntotal)
    ids = faiss.vector_to_array(index.id_map).tolist()
    return ids, np.stack([index.reconstruct(one) for one in ids])


def _of_csv(path: Path) -> tuple[list[Any], np.ndarray]:
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", *(f"e{place}" for place in range(len(header) - 1))]
    return [row[0] for row in rows], np.array([row[1:] for row in rows], dtype=np.float32)


def _of_jsonl(path: Path) -> tuple[list[Any], np.ndarray]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
    return [row["id"] for row in rows], vectors


READERS: dict[str, Callable[[Path], tuple[list[Any], np.ndarray]]] = {
    "parquet": _of_parquet,
    "safetensors": _of_safetensors,
    "faiss": _of_faiss,
    "csv": _of_csv,
    "jsonl": _of_jsonl,
}


@pytest.mark.parametrize("of", ["strings", "integers"])
def test_every_format_holds_what_numpy_reads(
    all_served: dict[str, Served], of: str, tmp_path: Path
) -> None:
    assert {*READERS, "npy"} == {*WRITERS, "faiss"}
    for what in ("items", "users"):
        ids, vectors = _expected(all_served[of], what, tmp_path)
        assert isinstance(ids[0], str if of == "strings" else int)
        for format, read in READERS.items():
            path = _export(all_served[of], what, format=format, out=tmp_path)
            found_ids, found = read(path)
            if format == "csv":
                found_ids = [type(ids[0])(one) for one in found_ids]
            assert found_ids == ids, (what, format)
            # Text has as many digits as name a float32 and no other.
            assert np.array_equal(found, vectors), (what, format)


def test_the_manifest_describes_its_files(served: Served, tmp_path: Path) -> None:
    _, vectors = _expected(served, "items", tmp_path)
    found = json.loads((tmp_path / "items.npy.json").read_text())
    assert (found["count"], found["dim"], found["dtype"]) == (*vectors.shape, "float32")
    assert found["is_of_all"]
    assert found["rounding"] is found["index"] is None
    assert list(found["files"]) == ["items.npy", "items_ids.npy"]
    for name, about in found["files"].items():
        content = (tmp_path / name).read_bytes()
        assert about == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    expected = {"min": norms.min(), "mean": norms.mean(), "max": norms.max(), "std": norms.std()}
    assert found["norms"] == pytest.approx(expected, rel=1e-6)
    mark = served.config.run_dir / found["checkpoint"]["path"] / "complete.json"
    assert found["checkpoint"]["sha256"] == hashlib.sha256(mark.read_bytes()).hexdigest()


def test_narrow_numbers_are_what_their_readers_restore(served: Served, tmp_path: Path) -> None:
    ids, exact = _expected(served, "items", tmp_path)
    half = pq.read_table(_export(served, "items", dtype="float16", out=tmp_path))
    assert str(half.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[16]"
    assert np.array_equal(
        half["embedding"].combine_chunks().values.to_numpy().reshape(exact.shape),
        exact.astype(np.float16),
    )
    path = _export(served, "items", format="safetensors", dtype="bfloat16", out=tmp_path)
    brain = safetensors.torch.load_file(path)["embeddings"]
    assert torch.equal(brain, torch.from_numpy(exact).bfloat16())

    eighth = pl.read_parquet(_export(served, "items", dtype="int8", out=tmp_path))
    codes, scales = eighth["embedding"].to_numpy(), eighth["scale"].to_numpy()
    assert eighth.columns == ["id", "scale", "embedding"]
    assert (eighth["id"].to_list(), codes.dtype) == (ids, np.int8)
    restored = codes * scales[:, None]
    assert (np.abs(restored - exact) <= scales[:, None] * 0.5001).all()
    for format, read in (("safetensors", safetensors.numpy.load_file), ("npy", np.load)):
        path = _export(served, "items", format=format, dtype="int8", out=tmp_path)
        if format == "npy":
            found = [read(path), read(tmp_path / "items_scales.npy")]
        else:
            tensors = read(path)
            found = [tensors["embeddings"], tensors["scales"]]
        assert np.array_equal(found[0], codes)
        assert np.array_equal(found[1], scales)

    rounding = json.loads((tmp_path / "items.parquet.json").read_text())["rounding"]
    errors = np.linalg.norm(restored - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert rounding["max_relative_error"] == pytest.approx(errors.max(), rel=1e-3)
    assert rounding["rms_relative_error"] == pytest.approx((errors**2).mean() ** 0.5, rel=1e-3)
    assert rounding["num_sampled"] == len(exact)
    assert rounding["neighbours_kept"] == pytest.approx(_share_kept(exact, restored))


def _share_kept(exact: np.ndarray, rounded: np.ndarray) -> float:
    near = []
    for rows in (exact, rounded):
        scores = rows @ rows.T
        np.fill_diagonal(scores, -np.inf)
        near.append(np.argsort(-scores, axis=1)[:, :10])
    kept = [len(set(a) & set(b)) for a, b in zip(*near, strict=True)]
    return sum(kept) / (10 * len(kept))


def test_rounding_keeps_zeros_and_refuses_what_float16_does_not_reach() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1e-3, -127e-3], [3.0, 1.0]])
    rounded = round_to(vectors, "int8")
    assert rounded.values.tolist() == [[0, 0], [1, -127], [127, 42]]
    assert torch.allclose(rounded.restored(), vectors, atol=0.5 * 3 / 127)
    meter = RoundingMeter(3)
    for exact in vectors.split(2):
        meter.add(exact, exact)
    found = meter.found()
    assert (found.max_relative_error, found.neighbours_kept, found.num_sampled) == (0, 1, 3)
    with pytest.raises(ValueError, match="float16 reaches 65504, the vectors 70000; use bfloat16"):
        round_to(torch.tensor([[7e4]]), "float16")


def test_the_error_of_rounding_is_of_a_sample_of_many_rows() -> None:
    vectors = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    meter = RoundingMeter(len(vectors))
    for exact in vectors.split(1234):
        meter.add(exact, exact.sign())  # keeps the direction roughly
    found = meter.found()
    assert found.num_sampled == 4096
    assert 0.01 < found.neighbours_kept < 0.9


@pytest.mark.parametrize("of", ["strings", "integers"])
def test_given_ids_are_exported_in_their_order(
    all_served: dict[str, Served], of: str, tmp_path: Path
) -> None:
    for what in ("items", "users"):
        ids, vectors = _expected(all_served[of], what, tmp_path)
        chosen = [7, 0, 19, 3]
        asked = [ids[place] for place in chosen]
        asked[1] = str(asked[1])  # an integer's text names it, too
        path = _export(all_served[of], what, ids=asked, out=tmp_path)
        found_ids, found = _of_parquet(path)
        assert found_ids == [ids[place] for place in chosen]
        # A product of another shape rounds otherwise.
        assert np.allclose(found, vectors[chosen], rtol=1e-5, atol=1e-6)
        assert not json.loads((tmp_path / f"{what}.parquet.json").read_text())["is_of_all"]


def test_an_unknown_id_is_named_with_a_hint(served: Served, tmp_path: Path) -> None:
    for what, ids, message in (
        ("items", ["i3", "i33"], 'item "i33": not in the prepared dataset .* did you mean "i3'),
        ("users", ["nobody"], 'user "nobody": not in the prepared dataset'),
        ("items", [], "ids: none is given"),
    ):
        with pytest.raises(ValueError, match=message):
            _export(served, what, ids=ids, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metric", ["inner_product", "cosine"])
@pytest.mark.parametrize("of", ["strings", "integers"])
def test_every_index_answers_with_the_ids_that_are_nearest(
    all_served: dict[str, Served], of: str, metric: str, tmp_path: Path
) -> None:
    ids, vectors = _expected(all_served[of], "items", tmp_path)
    keys = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = keys if metric == "cosine" else vectors
    queries = keys[:5]
    expected = np.argsort(-queries @ keys.T, axis=1)[:, :3]
    for options in (
        {"kind": "flat"},
        {"kind": "ivf", "num_lists": 3, "num_probes": 3},
        {"kind": "hnsw", "num_links": 8},
        {"kind": "pq", "num_parts": 8, "bits": 4},
    ):
        index = IndexConfig(metric=metric, **options)  # type: ignore[arg-type]
        path = _export(all_served[of], "items", format="faiss", index=index, out=tmp_path)
        _, found = faiss.read_index(str(path)).search(queries, 3)
        beside = _ids_beside(path)
        named = [[beside[one] if beside else one for one in row] for row in found.tolist()]
        right = [[ids[one] for one in row] for row in expected.tolist()]
        if options["kind"] == "pq":  # 16 centres of 30 vectors: near, not exact
            shares = [len(set(a) & set(b)) / 3 for a, b in zip(named, right, strict=True)]
            assert np.mean(shares) > 0.5
        else:
            assert named == right, options
        manifest = json.loads(path.with_name("items.faiss.json").read_text())
        assert options.items() <= manifest["index"].items()
        assert manifest["index"]["metric"] == metric


def test_a_stage_and_a_checkpoint_are_exported_as_they_are(
    cycle_folder: Path, tmp_path: Path
) -> None:
    steps = {"epochs": 2, "learning_rate": 0.05, "warmup_steps": 0, "checkpoint_every": 3}
    trained = {**UNTRAINED, **steps, "keep_checkpoints": 4}
    config = tiny_config(cycle_folder, run_dir=tmp_path / "run", pretrain=trained)
    pipeline.prepare(config)
    pipeline.pretrain(config)
    finished = load_result(tmp_path / "run/pretrain")
    assert finished is not None
    checkpoints = sorted((tmp_path / "run/pretrain/checkpoints").iterdir())
    assert len(checkpoints) > 1
    tables = {}
    for checkpoint in checkpoints:
        (shard,) = checkpoint.glob("*.safetensors")
        (tables[checkpoint],) = [
            value
            for name, value in safetensors.numpy.load_file(shard).items()
            if name.startswith("model.") and name.endswith("embeddings.item.weight")
        ]
        path = export_embeddings(checkpoint, "items", format="npy", out=tmp_path)
        assert np.array_equal(np.load(path), tables[checkpoint])
    assert not np.array_equal(tables[checkpoints[0]], tables[checkpoints[1]])
    for stage in (config.run_dir, config.run_dir / "pretrain"):
        path = export_embeddings(stage, "items", format="npy", out=tmp_path)
        assert np.array_equal(np.load(path), tables[finished.checkpoint])
    with pytest.raises(ValueError, match="prepared: holds no checkpoint; give the folder of a run"):
        export_embeddings(config.run_dir / "prepared", "items")


@pytest.mark.parametrize("format", [*WRITERS, "faiss"])
def test_a_writer_that_fails_leaves_the_former_files_or_none(
    served: Served, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export() -> None:
        _export(served, "items", format=format, out=tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for _ in range(2):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr("torchrec_pt.export.embeddings.about_files", fail)
            with pytest.raises(WriteError, match=r"items.*cannot be written, No space left"):
                export()
        with monkeypatch.context() as patch:
            patch.setattr("torchrec_pt.export.embeddings.round_to", fail)
            with pytest.raises(WriteError):
                export()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        export()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ["pickle"]}, "formats"),
        (
            {"formats": ["npy", "parquet"], "dtype": "bfloat16"},
            'dtype: npy holds float32 or float16 or int8, given "bfloat16"; use .* safetensors',
        ),
        ({"formats": ["faiss"], "dtype": "int8"}, 'faiss holds float32, .* index.kind = "pq"'),
        ({"ids": "ids.txt"}, r'ids are of items or of users; set what to \["items"\]'),
        ({"index": {"kind": "hnsw", "bits": 4}}, 'bits is of an index of kind "pq"'),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportConfig.model_validate(settings)


def test_from_python_too(runs: dict[str, RunConfig]) -> None:
    for arguments, message in (
        ({"format": "pickle"}, 'format: unknown "pickle"; use one of parquet, npy'),
        ({"dtype": "bfloat16"}, 'parquet holds .* given "bfloat16"; use .* safetensors'),
        ({"what": "ratings"}, 'what: is "items" or "users", given "ratings"'),
    ):
        what = arguments.pop("what", "items")
        with pytest.raises(ValueError, match=message):
            export_embeddings(runs["strings"].run_dir, what, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (
            {"formats": ["faiss"], "index": {"kind": "pq"}},
            "codes of 8 bits need 256 vectors or more, given 30; use fewer bits",
        ),
        (
            {"formats": ["faiss"], "index": {"kind": "pq", "num_parts": 3, "bits": 4}},
            "must divide the 16 numbers of a vector, given 3; use 1",
        ),
        (
            {"formats": ["faiss"], "index": {"kind": "ivf", "num_lists": 31}},
            "num_lists: at most as many as vectors, given 31 for 30",
        ),
        ({"what": ["items"], "ids": "{folder}/ids.txt"}, 'item "i77": not in the prepared'),
        ({"what": ["items"], "ids": "{folder}/none.txt"}, "none.txt: cannot be read"),
    ],
)
def test_what_the_export_of_a_run_lacks_is_said_before_training(
    cycle_folder: Path, tmp_path: Path, export: dict[str, Any], message: str
) -> None:
    (tmp_path / "ids.txt").write_text("i1\ni77\n")
    if "ids" in export:
        export["ids"] = export["ids"].format(folder=tmp_path)
    config = tiny_config(cycle_folder, run_dir=tmp_path / "run", export=export)
    dataset = pipeline.prepare(config)
    with pytest.raises(ValueError, match=message):
        pipeline.check(config, dataset)
    assert not (tmp_path / "run/pretrain").exists()


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["torchrec-pt", "export", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_line_exports_any_folder_and_leaves_the_run_as_it_is(
    runs: dict[str, RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = runs["integers"].run_dir
    before = (run_dir / "config.json").read_bytes()
    (tmp_path / "ids.txt").write_text("3\r\n1\n\n2")
    options = ("--what", "items", "--ids", tmp_path / "ids.txt", "--out", tmp_path / "out")
    asked = ("--format", "safetensors", "--format", "npy", "--dtype", "int8")
    assert _call(monkeypatch, run_dir / "pretrain", *options, *asked) == 0
    said = capsys.readouterr().out
    assert f"export: items in {tmp_path}/out/items.safetensors\n" in said
    assert "export: items as int8: relative error of rounding at most 0.0" in said
    assert "of the 10 nearest kept among 3 rows" in said
    assert _of_safetensors(tmp_path / "out/items.safetensors")[0] == [3, 1, 2]
    assert (run_dir / "config.json").read_bytes() == before

    index = ("--format", "faiss", "--index", "hnsw", "--metric", "cosine")
    assert _call(monkeypatch, run_dir, *options, *index, "--set", "export.index.num_links=8") == 0
    described = json.loads((tmp_path / "out/items.faiss.json").read_text())["index"]
    assert (described["kind"], described["metric"], described["num_links"]) == ("hnsw", "cosine", 8)

    for arguments, message in (
        ((run_dir, "--dtype", "bfloat16"), "parquet holds float32 or float16 or int8"),
        ((run_dir, "--format", "hdf5"), 'unknown value "hdf5"; choose one of parquet, npy'),
        ((run_dir, "--ids", tmp_path / "ids.txt"), "ids are of items or of users"),
        ((tmp_path,), f"{tmp_path}: holds no run"),
    ):
        capsys.readouterr()
        assert _call(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_configuration_names_what_a_run_exports(cycle_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        f'run_dir = "{tmp_path}/run"\n[data]\nformat = "tsv"\npath = "{cycle_folder}/log.tsv"\n'
        '[export]\nwhat = ["items"]\nformats = ["faiss"]\nindex = { kind = "ivf" }\n'
    )
    export = load_config(path).export
    assert (export.formats, export.index.kind, export.dtype) == (("faiss",), "ivf", "float32")
    with pytest.raises(ConfigError, match=r'export.index: num_parts is of an index of kind "pq"'):
        load_config(path, ["export.index.num_parts=4"])
    (tmp_path / "ids").write_bytes(b"\xff")
    with pytest.raises(DataError, match="must be UTF-8"):
        read_ids(tmp_path / "ids")
