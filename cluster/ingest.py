"""Preparation over a Ray cluster: Ray Data reads and works on the interactions.

    python -m cluster.ingest CONFIG.toml     prepares alone, on the Ray of RAY_ADDRESS or one here

The dataset is the one that `torchrec-pt prepare` writes, to the byte. Blocks of the log stream
into partitions by user, in files beside the dataset, and every later pass takes a partition at a
time. So neither the object store nor the memory of a node need hold the log; a task holds a block
or a partition, the driver the users, the items, and of the rows a column at a time. A file of the
log is read by one task: a log of many files is read by many.

The log and the folder of the dataset must be where every node sees them.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import ray
import ray.data
import typer
from ray.exceptions import RayError
from rich.console import Console

from cluster.client import mistakes_of
from cluster.ingest_tasks import Reading, Routing
from torchrec_pt.config import RunConfig
from torchrec_pt.config_file import load_config
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.manifest import Manifest
from torchrec_pt.data.partitioned_engine import PartitionedInteractions, Sizes
from torchrec_pt.data.prepare import prepare
from torchrec_pt.data.readers import RawData

_T = TypeVar("_T")


def prepare_on_ray(
    config: RunConfig, console: Console | None = None, sizes: Sizes | None = None
) -> Manifest:
    """`torchrec_pt.data.prepare.prepare` over the Ray that this process is connected to.

    Raises:
        DataError: as `prepare`, or a folder that not every node sees.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    started_at = time.monotonic()
    opened = partial(RayInteractions, sizes=sizes or Sizes(block=1 << 18))
    manifest = prepare(config.data, config.prepared_dir, config.seed, opened)
    if console is not None:
        console.print(
            f"prepare: {manifest.num_interactions:,} interactions by Ray Data in "
            f"{time.monotonic() - started_at:.1f} s",
            highlight=False,
        )
    return manifest


class RayInteractions(PartitionedInteractions):
    """Blocks and partitions are dealt to the tasks of Ray Data."""

    def _deal(self, raw: RawData, sizes: Sizes) -> list[int]:
        path = self._config.path
        working_dir = None if path.is_absolute() else Path.cwd()
        files = [{"file": pickle.dumps(file)} for file in raw.files]
        blocks = (
            ray.data.from_items(files, override_num_blocks=len(files))
            .map_batches(
                Reading(path, raw.sources, working_dir, sizes.block),
                batch_size=1,
                batch_format="pyarrow",
            )
            .map_batches(
                Routing(self._scratch),
                batch_size=None,
                batch_format="pyarrow",
            )
        )
        first_rows = [row["first_row"] for row in _taken(blocks)]
        if not all(self._scratch.of("blocks", row).is_file() for row in first_rows):
            raise DataError(
                f"data.prepared: {self._scratch.folder.parent} must be a folder that every node "
                "sees, a node wrote into one of its own; choose another, or ingest locally"
            )
        return first_rows

    def _each(self, task: Callable[..., _T], *arguments: Any) -> list[_T]:
        """task(scratch, partition, *arguments) for every partition, in their order."""
        scratch = self._scratch
        num_partitions = scratch.num_partitions

        def call(row: dict[str, Any]) -> dict[str, Any]:
            partition = int(row["id"])
            result: _T | DataError
            try:
                result = task(scratch, partition, *arguments)
            except DataError as error:  # raised, Ray Data would log its traceback
                result = error
            return {"partition": partition, "result": pickle.dumps(result)}

        rows = _taken(ray.data.range(num_partitions, override_num_blocks=num_partitions).map(call))
        rows.sort(key=lambda row: row["partition"])
        results = [pickle.loads(row["result"]) for row in rows]
        for result in results:
            if isinstance(result, DataError):
                raise result
        return results


def _taken(dataset: ray.data.Dataset) -> list[dict[str, Any]]:
    """All rows.

    Raises:
        DataError: what a task raised for the user.
    """
    try:
        return dataset.take_all()
    except RayError as error:
        # Ray's own error is an instance of its cause's class, too, but says more than a line.
        found: BaseException | None = error
        while isinstance(found, RayError):
            found = getattr(found, "cause", None) or found.__cause__
        if isinstance(found, DataError):
            raise DataError(str(found).splitlines()[0]) from None  # Ray Data adds lines to it
        raise


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ingest(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE")] = None,
) -> None:
    """Prepare the dataset of a run over a Ray cluster."""
    settings = load_config(config, set_ or ())
    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    prepare_on_ray(settings, Console(soft_wrap=True, markup=False, emoji=False))


def main() -> None:
    with mistakes_of("cluster.ingest"):
        app()


if __name__ == "__main__":
    main()
