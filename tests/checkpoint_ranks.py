"""Checkpoints saved, loaded and grown by one process or by torchrun.

python checkpoint_ranks.py save|load PREPARED GROWN FOLDER CASES.json

save trains each case's model for three steps and saves FOLDER/<case>/saved. load reads that into
a model of other initial values, placed as the case says, over the same items (FOLDER/<case>/
loaded-<world size>) and over those of GROWN (grown-…, and fresh-… as it was before).
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import torchrec_pt.saver as saver_module
from torchrec_pt.build import build_learner
from torchrec_pt.checkpoint import Checkpoint
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, gather_objects, joined_ranks
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.optim import Optimizers
from torchrec_pt.saver import Saver
from torchrec_pt.transfer import Numbering, continue_training, model_tensors, optimizer_tensors


class Model:
    """A model of a case over a catalogue, with its optimizers."""

    def __init__(
        self, case: dict[str, Any], table: dict[str, Any], dataset: PreparedDataset, ranks: Ranks
    ) -> None:
        config = RunConfig.model_validate(case)
        item_table = config.model.item_table.model_copy(update=table)
        model = config.model.model_copy(update={"item_table": item_table})
        config = config.model_copy(update={"model": model})
        assert config.pretrain is not None
        self.ranks = ranks
        self.numbering = Numbering.of(dataset)
        self.items = self.numbering.items
        objectives = build_objectives(config, dataset)
        self.built = build_learner(config, config.pretrain, objectives, dataset, ranks)
        self.optimizers = Optimizers(self.built.model, config.pretrain, self.built.placement, 100)
        self.loader = HistoryLoader(dataset, batch_size=10, max_length=8, seed=0, ranks=ranks)

    def train(self, num_steps: int) -> None:
        for step, rows in zip(range(num_steps), self.loader.steps(0), strict=False):
            self.optimizers.prepare(step)
            self.built.model(self.built.learner.draw(rows)).loss.backward()
            self.optimizers.step()

    def save(self, folder: Path, name: str) -> None:
        tensors = model_tensors(self.built.model) | optimizer_tensors(self.optimizers)
        with Saver(folder, self.items, self.ranks, keep_last=9, in_background=True) as saver:
            saver.save(0, tensors, {}, best_step=0)
            if name == "saved":  # training goes on, and talks, while it is written
                self.train(2)
        if self.ranks.is_first:
            (folder / "step-00000000").rename(folder / name)


def save(folder: Path, cases: Any, prepared: PreparedDataset, _: Any, ranks: Ranks) -> None:
    for name, case in cases.items():
        model = Model(case["config"], {}, prepared, ranks)
        model.train(3)
        model.save(folder / name, "saved")
    _fails_alike(folder, model, ranks)


def _fails_alike(folder: Path, model: Model, ranks: Ranks) -> None:
    """One rank's disk is full: what each rank raises is written down."""
    write = saver_module.write_safetensors

    def full(*given: Any) -> str:
        if ranks.rank == ranks.world_size - 1:
            raise OSError(errno.ENOSPC, "no space left")
        return write(*given)

    saver_module.write_safetensors = full  # type: ignore[assignment]
    said = []
    try:
        for _ in range(2):  # the first is told by the second
            model.save(folder / "full", "full")
    except ValueError as error:
        said = gather_objects(str(error))
    saver_module.write_safetensors = write
    if ranks.is_first:
        (folder / "full.json").write_text(json.dumps(said))


def load(
    folder: Path, cases: Any, prepared: PreparedDataset, grown: PreparedDataset, ranks: Ranks
) -> None:
    for name, case in cases.items():
        config, table = {**case["config"], "seed": 1}, case["into"]
        path = folder / name / "saved"
        model = Model(config, table, prepared, ranks)
        tensors = model_tensors(model.built.model) | optimizer_tensors(model.optimizers)
        opened = Checkpoint.open(path, ranks)
        # AdamW has states that a table trained by SGD has not.
        held = {name: tensor for name, tensor in tensors.items() if name in opened.tensors}
        opened.load(held, model.items)
        model.save(folder / name, f"loaded-{ranks.world_size}")

        model = Model(config, table, grown, ranks)
        model.save(folder / name, f"fresh-{ranks.world_size}")
        continue_training(path, model.built.model, model.optimizers, model.numbering, ranks)
        model.save(folder / name, f"grown-{ranks.world_size}")
    said = ""
    try:
        Checkpoint.open(folder / "damaged", ranks)
    except ValueError as error:
        said = str(error)
    said_by_all = gather_objects(said)
    if ranks.is_first:
        (folder / f"damaged-{ranks.world_size}.json").write_text(json.dumps(said_by_all))


def main(what: str, prepared: str, grown: str, folder: str, cases: str) -> None:
    with joined_ranks() as ranks:
        datasets = [PreparedDataset.load(path, ranks) for path in (prepared, grown)]
        {"save": save, "load": load}[what](
            Path(folder), json.loads(Path(cases).read_text()), *datasets, ranks
        )
    tasks = Path("/proc/self/task").glob("*/comm")  # none but on Linux
    alive = [task.read_text().strip() for task in tasks]
    assert not [name for name in alive if "gloo" in name], alive


if __name__ == "__main__":
    main(*sys.argv[1:])
