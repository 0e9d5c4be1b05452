"""Texts with an encoder: encoded once, kept beside the data, read without the encoder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchrec_pt.config import DataConfig
from torchrec_pt.data import prepare as prepare_module
from torchrec_pt.data import text_vectors
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import load_entity_features
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.prepare import is_prepared_from, prepare
from torchrec_pt.distributed import Ranks

DIM = 4
# Of items 0, 1, …: the last two of a user are held out.
TITLES = ["red car", "", "blue car", "red car", "  ", "green", "a new text"]


def plain_vector(text: str) -> list[float]:
    """Of norm len(text), so that the scale shows."""
    return [len(text) * 0.6, 0.0, len(text) * 0.8, 0.0]


class Encoder:
    """What `load_encoder` gives, with a memory of the batches it was asked for."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        self.batches.append(list(texts))
        return np.array([plain_vector(text) for text in texts])


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    encoder = Encoder()
    monkeypatch.setattr(prepare_module, "load_encoder", lambda found: encoder)
    return encoder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "weights").write_text("some")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def config_of(folder: Path, model: Path | str | None, of: str = "item") -> DataConfig:
    """One user who takes every item, or every user with one item; row i has text i."""
    log = folder / "log.csv"
    ids = "0,{0}" if of == "item" else "{0},0"
    lines = [f"{ids.format(i)},{i},{title}" for i, title in enumerate(TITLES)]
    log.write_text("\n".join(["user_id,item_id,time,title", *lines]) + "\n")
    feature = {"column": "title", "of": of, "kind": "text", "encoder": model and str(model)}
    raw = {"format": "csv", "path": log, "columns": {"timestamp": "time"}, "features": [feature]}
    return DataConfig.model_validate(raw)


def test_each_text_is_encoded_once_and_in_batches(
    tmp_path: Path, model: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_vectors, "TEXTS_AT_A_TIME", 3)
    prepare(config_of(tmp_path, model), tmp_path / "out", 0)
    assert encoder.batches == [["red car", "blue car", "green"], ["a new text"]]


@pytest.mark.parametrize("per_group", [2, 100])
def test_vectors_stand_at_dense_ids_in_units_of_training(
    per_group: int, tmp_path: Path, model: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_ITEMS_PER_GROUP", per_group)
    manifest = prepare(config_of(tmp_path, model), tmp_path / "out", 0)
    (summary,) = manifest.features
    # "green" and "a new text" do not train.
    scale = np.sqrt(np.mean([7**2, 8**2, 7**2]))
    assert summary.scale == pytest.approx(scale)
    assert summary.dim == DIM
    dataset = PreparedDataset.load(tmp_path / "out")
    features = load_entity_features(dataset, "item")
    assert features.skipped == ()
    titles = [TITLES[i] for i in dataset.items["external_id"]]
    vectors = torch.tensor([plain_vector(title.strip()) for title in titles])
    torch.testing.assert_close(features.dense["title"], vectors / scale)
    assert dataset.items["title"].to_list() == [title or None for title in titles]


def test_a_rank_reads_the_vectors_of_its_own_users(
    tmp_path: Path, model: Path, encoder: Encoder
) -> None:
    prepare(config_of(tmp_path, model, of="user"), tmp_path / "out", 0)
    whole = load_entity_features(PreparedDataset.load(tmp_path / "out"), "user").dense["title"]
    for rank in range(9):  # two of them without a user
        dataset = PreparedDataset.load(tmp_path / "out", Ranks(rank, 9, 9, torch.device("cpu")))
        own = load_entity_features(dataset, "user").dense["title"]
        assert own.shape == (dataset.num_users, DIM)
        assert torch.equal(own, whole[dataset.user_ids])


def test_a_text_without_an_encoder_is_shown_and_not_read(tmp_path: Path) -> None:
    manifest = prepare(config_of(tmp_path, None), tmp_path / "out", 0)
    assert not any(name.startswith("text_") for name in manifest.files)
    dataset = PreparedDataset.load(tmp_path / "out")
    assert load_entity_features(dataset, "item").skipped == ("title",)
    assert "red car" in dataset.items["title"].to_list()


def test_no_text_at_all_is_nothing_to_read(
    tmp_path: Path, model: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TITLES", ["", "  ", "", ""])
    prepare(config_of(tmp_path, model), tmp_path / "out", 0)
    assert encoder.batches == []
    features = load_entity_features(PreparedDataset.load(tmp_path / "out"), "item")
    assert (features.skipped, features.num_fields) == (("title",), 0)


# --- another encoder is another dataset -----------------------------------------------------------


def test_the_encoder_is_asked_again_only_when_its_content_changes(
    tmp_path: Path, model: Path, encoder: Encoder
) -> None:
    config, out = config_of(tmp_path, model), tmp_path / "out"
    first = prepare(config, out, 0)
    asked = len(encoder.batches)
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").write_text("hidden files are not of the model")
    assert prepare(config, out, 0) == first
    assert len(encoder.batches) == asked
    (model / "1_Pooling" / "config.json").write_text("{ }")
    second = prepare(config, out, 0)
    assert second.fingerprint != first.fingerprint
    assert second.features[0].encoder_sha256 != first.features[0].encoder_sha256
    assert len(encoder.batches) == 2 * asked


def test_what_was_prepared_is_known_and_read_without_the_encoder(
    tmp_path: Path, model: Path, encoder: Encoder
) -> None:
    config, out = config_of(tmp_path, model), tmp_path / "out"
    manifest = prepare(config, out, 0)
    shutil.rmtree(model)
    assert is_prepared_from(manifest, config, 0)
    assert not is_prepared_from(manifest, config_of(tmp_path, None), 0)
    assert load_entity_features(PreparedDataset.load(out), "item").num_fields == 1


# --- what goes wrong ------------------------------------------------------------------------------


def test_an_encoder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(config_of(tmp_path, tmp_path / "nowhere"), tmp_path / "out", 0)
    assert str(caught.value) == (
        "data.features: item title: the encoder must be the folder of a sentence-transformers "
        f'model or the name of one in the local cache, "{tmp_path / "nowhere"}" is neither; '
        "mend the path, or download the model"
    )


def test_a_missing_package_is_one_line(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # what an import then raises on
    with pytest.raises(DataError, match="is not installed; pip install") as caught:
        prepare(config_of(tmp_path, model), tmp_path / "out", 0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "encode",
    [
        lambda texts: np.full((len(texts), 2), np.nan),
        lambda texts: np.zeros((len(texts) + 1, 2)),
        lambda texts: np.zeros(len(texts)),
        lambda texts: np.zeros((len(texts), len(texts[0]))),
    ],
    ids=["not finite", "one too many", "no vectors", "of two lengths"],
)
def test_bad_vectors_of_an_encoder_are_refused(
    encode: Callable[[Sequence[str]], Any],
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare_module, "load_encoder", lambda found: encode)
    monkeypatch.setattr(text_vectors, "TEXTS_AT_A_TIME", 2)
    with pytest.raises(DataError, match="item title: the encoder must give a finite vector a text"):
        prepare(config_of(tmp_path, model), tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_lost_vectors_are_one_line(tmp_path: Path, model: Path, encoder: Encoder) -> None:
    prepare(config_of(tmp_path, model), tmp_path / "out", 0)
    dataset = PreparedDataset.load(tmp_path / "out")
    (tmp_path / "out" / "text_0.parquet").unlink()
    with pytest.raises(DataError, match=r"text_0\.parquet: must have \d+ bytes, is missing"):
        PreparedDataset.load(tmp_path / "out")
    with pytest.raises(DataError, match=r"damaged, .*; remove the folder and prepare it again"):
        load_entity_features(dataset, "item")


# --- sentence-transformers itself, where it is installed ------------------------------------------


def save_tiny_model(folder: Path) -> None:
    """A vector for each of a few words; a sentence is their mean."""
    package = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "red", "blue", "green", "car", "a", "new", "text"]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    static = modules.StaticEmbedding(tokenizer, embedding_weights=np.eye(len(words)))
    package.SentenceTransformer(modules=[static], device="cpu").save(str(folder))


def test_a_real_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny")
    manifest = prepare(config_of(tmp_path, tmp_path / "tiny"), tmp_path / "out", 0)
    assert manifest.features[0].dim == 8
    dataset = PreparedDataset.load(tmp_path / "out")
    vectors = dataset.text_vectors(manifest.features[0])
    red, nothing, blue, *_ = (vectors[dataset.item_index(i)] for i in range(len(TITLES)))
    assert red.tolist() == [0, 0.5, 0, 0, 0.5, 0, 0, 0]
    assert blue.tolist() == [0, 0, 0.5, 0, 0.5, 0, 0, 0]
    assert not nothing.any()


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(DataError, match="cannot be loaded as a sentence-transformers model, ") as e:
        prepare(config_of(tmp_path, model), tmp_path / "out", 0)
    assert "\n" not in str(e.value)
