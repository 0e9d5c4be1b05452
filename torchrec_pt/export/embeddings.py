"""From a trained model to files: which vectors, rounded how, in which format, and a manifest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rich.console import Console
from torch import Tensor

from torchrec_pt.config import ExportConfig, IndexConfig, RunConfig
from torchrec_pt.config.export import Dtype, Format, What, check_dtype
from torchrec_pt.data.dataset import PreparedDataset, indices_of
from torchrec_pt.data.errors import DataError, reading
from torchrec_pt.distributed import joined_ranks, raised_together
from torchrec_pt.export.formats import WRITERS, Files, Vectors
from torchrec_pt.export.manifest import (
    ExportManifest,
    NormMeter,
    about_files,
    origin_of,
    versions,
)
from torchrec_pt.export.rounding import Rounded, RoundingMeter, round_to
from torchrec_pt.export.vectors import all_items, all_users, some_items, some_users
from torchrec_pt.served import Served, load_served


@dataclass(frozen=True)
class Asked:
    """One export; the fields are the arguments of `export_embeddings`."""

    what: What
    format: Format
    dtype: Dtype
    index: IndexConfig
    ids: Sequence[str | int] | None
    out: Path | None

    def path(self, run_dir: Path) -> Path:
        """The file with the embeddings."""
        return (self.out or run_dir / "export") / f"{self.what}.{self.format}"


def export_embeddings(
    path: str | Path,
    what: What,
    *,
    ids: Sequence[str | int] | None = None,
    format: Format = "parquet",
    dtype: Dtype = "float32",
    index: IndexConfig | None = None,
    out: str | Path | None = None,
) -> Path:
    """Write the embeddings of a trained model with their external ids; all ranks call it.

    The files (`formats` says which) appear whole or not at all, and after them the manifest,
    <what>.<format>.json. Users' vectors are those after their whole history, with the map of a
    linear head in them. Inner products of the vectors rank as the model does, but for one with an
    mlp head.

    Args:
        path: the folder of a run, whose served model is exported, or of a training stage or a
            checkpoint in it.
        ids: external ids of those to export, in this order; default: all, by dense id.
        dtype: of int8 a row is codes and a float32 scale. bfloat16 is of safetensors alone; faiss,
            csv and jsonl hold float32.
        index: of format faiss; default: exact, by inner product.
        out: a folder; default <run_dir>/export.
    Returns:
        The file with the embeddings.
    Raises:
        ValueError: nothing trained there, an unknown id, or what the format does not hold.
    """
    check_dtype(format, dtype)
    if what not in ("items", "users"):
        raise ValueError(f'what: is "items" or "users", given "{what}"; use one of them')
    folder = None if out is None else Path(out)
    asked = Asked(what, format, dtype, index or IndexConfig(), ids, folder)
    with joined_ranks() as ranks:
        served = load_served(Path(path), ranks)
        write_embeddings(served, asked)
        return asked.path(served.config.run_dir)


def export_all(path: Path, config: ExportConfig, console: Console | None = None) -> list[Path]:
    """What [export] names, of a model that is loaded once; all ranks call it.

    Args:
        path: as of `export_embeddings`.
    Raises:
        ValueError: as there.
    """
    with joined_ranks() as ranks:
        with raised_together():
            ids = None if config.ids is None else read_ids(config.ids)
        served = load_served(path, ranks)
        lines, paths = [], []
        for what, format in itertools.product(config.what, config.formats):
            asked = Asked(what, format, config.dtype, config.index, ids, config.out)
            manifest = write_embeddings(served, asked)
            paths.append(asked.path(served.config.run_dir))
            lines.append(f"{what} in {paths[-1]}")
            if manifest is not None and manifest.rounding is not None:
                lines.append(f"{what} as {config.dtype}: {manifest.rounding}")
        ranking = served.config.finetune.ranking
        if served.is_of_ranking and ranking is not None and ranking.head == "mlp":
            lines.append(
                "the served model ranks by its mlp head, so inner products of these vectors alone "
                "do not reproduce its ranking; ask Recommender for that"
            )
        if console is not None and ranks.is_first:
            for line in lines:
                console.print(f"export: {line}", highlight=False)
        return paths


def check_export(config: RunConfig, dataset: PreparedDataset) -> None:
    """What [export] needs of the data; all ranks call it.

    Raises:
        ValueError: an unknown id, or vectors too few for the index.
    """
    export, manifest = config.export, dataset.manifest
    nums = {"items": manifest.num_items, "users": manifest.num_users}
    if export.ids is not None:
        (what,) = export.what
        with raised_together():
            ids = read_ids(export.ids)
        nums[what] = len(indices_of(external_ids(dataset, what), ids, what.removesuffix("s")))
    if "faiss" in export.formats:
        from torchrec_pt.export.faiss_index import settle_index

        for what in export.what:
            settle_index(export.index, nums[what], config.model.dim)


def read_ids(path: Path) -> list[str]:
    """External ids of a text file, one a line; empty lines are none.

    Raises:
        DataError: a file that cannot be read, or that holds no id.
    """
    with reading(path):
        content = path.read_bytes()
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8, {error.reason}; convert it") from None
    ids = [line.removesuffix("\r") for line in lines]
    return [one for one in ids if one]


def write_embeddings(served: Served, asked: Asked) -> ExportManifest | None:
    """The files of one export; all ranks call it.

    Returns:
        On the first rank, what is in the manifest.
    """
    ids, blocks = _vectors(served, asked)
    manifest = None
    with raised_together():
        try:
            if served.ranks.is_first:
                manifest = _write(served, asked, ids, blocks)
        finally:
            for _ in blocks:  # made by all ranks together, written by the first
                pass
    return manifest


def external_ids(dataset: PreparedDataset, what: What) -> pl.Series:
    """Of all items or users, by dense id."""
    return dataset.items["external_id"] if what == "items" else dataset.external_user_ids()


def _vectors(served: Served, asked: Asked) -> tuple[pl.Series, Iterator[Tensor]]:
    """External ids, and the vectors in their order: blocks that all ranks make together.

    Raises:
        DataError: an unknown id.  ValueError: none at all.
    """
    dataset, learner, ranks = served.dataset, served.learner, served.ranks
    is_items, external = asked.what == "items", external_ids(dataset, asked.what)
    if asked.ids is None:
        if is_items:
            return external, all_items(learner.backbone, ranks)
        return external, all_users(learner, dataset, ranks)
    if not len(asked.ids):
        raise ValueError("ids: none is given; leave ids out to export all")
    chosen = indices_of(external, asked.ids, asked.what.removesuffix("s"))
    external = external.gather(chosen.numpy())
    if is_items:
        return external, some_items(learner.backbone, chosen, ranks)
    return external, some_users(learner, dataset, chosen, ranks)


def _write(
    served: Served, asked: Asked, ids: pl.Series, blocks: Iterator[Tensor]
) -> ExportManifest:
    """The files, then the manifest; one of files that are replaced goes before them."""
    path, dim = asked.path(served.config.run_dir), served.learner.backbone.dim
    norms = NormMeter()
    rounding = None if asked.dtype == "float32" else RoundingMeter(len(ids))
    vectors = Vectors(ids, dim, asked.dtype, _rounded(blocks, asked.dtype, norms, rounding))
    index = None
    manifest_path = path.with_name(f"{path.name}.json")
    with Files.together(path) as files:
        if asked.format == "faiss":
            from torchrec_pt.export import faiss_index  # seconds that few exports need

            settled = faiss_index.settle_index(asked.index, len(ids), dim)
            index = faiss_index.described(settled)
            faiss_index.write_faiss(vectors, files, settled)
        else:
            WRITERS[asked.format](vectors, files)
        about = about_files(files.partial)
        manifest_path.unlink(missing_ok=True)
    manifest = ExportManifest(
        what=asked.what,
        format=asked.format,
        dtype=asked.dtype,
        count=len(ids),
        dim=dim,
        is_of_all=asked.ids is None,
        norms=norms.found(),
        rounding=None if rounding is None else rounding.found(),
        index=index,
        files=about,
        versions=versions(asked.format),
        **origin_of(served),
    )
    manifest.save(manifest_path)
    return manifest


def _rounded(
    blocks: Iterator[Tensor], dtype: Dtype, norms: NormMeter, rounding: RoundingMeter | None
) -> Iterator[Rounded]:
    """Blocks as they are written, on the CPU, measured on their way."""
    for block in blocks:
        exact = block.detach().cpu()
        norms.add(exact)
        rounded = round_to(exact, dtype)
        if rounding is not None:
            rounding.add(exact, rounded.restored())
        yield rounded
