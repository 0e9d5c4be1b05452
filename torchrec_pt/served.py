"""A trained model with its data, as it is exported and asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchrec_pt.build import build_task, load_learner
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks, raised_together
from torchrec_pt.learner import Learner
from torchrec_pt.runs import find_checkpoint, find_run, load_run_config, served_stage


@dataclass(frozen=True, eq=False)
class Served:
    """Attributes:
    config: of the run, wherever its folder is now.
    checkpoint: of the run, that the learner was loaded from.
    """

    config: RunConfig
    checkpoint: Path
    dataset: PreparedDataset
    learner: Learner
    ranks: Ranks

    @property
    def is_of_ranking(self) -> bool:
        """Whether the model was fine-tuned for ranking, and has that task's head."""
        return _is_of_ranking(self.checkpoint, self.config.run_dir)


def load_served(path: Path, ranks: Ranks) -> Served:
    """A run's served model, or that of one of its stages or checkpoints; all ranks call it.

    Args:
        path: the folder of a run, of a training stage in it, or of a checkpoint in that.
    Raises:
        ValueError: no run there, none that is finished, or no checkpoint.
    """
    run_dir = find_run(path)
    config = load_run_config(run_dir)
    with raised_together():
        dataset = PreparedDataset.load(config.prepared_dir, ranks)
    if path == run_dir:
        checkpoint = served_stage(config, dataset).checkpoint
    else:
        checkpoint = _checkpoint_of(path.resolve())
    is_of_ranking = _is_of_ranking(checkpoint, run_dir)
    objectives = [build_task(config, "ranking", dataset)] if is_of_ranking else []
    learner = load_learner(config, checkpoint, dataset, ranks, objectives)
    return Served(config, checkpoint, dataset, learner, ranks)


def _checkpoint_of(path: Path) -> Path:
    found = find_checkpoint(path)
    if found is None:
        raise ValueError(
            f"{path}: holds no checkpoint; give the folder of a run, of a training stage "
            "(<run_dir>/pretrain), or of one of its checkpoints"
        )
    return found


def _is_of_ranking(checkpoint: Path, run_dir: Path) -> bool:
    return checkpoint.relative_to(run_dir).parts[:2] == ("finetune", "ranking")
