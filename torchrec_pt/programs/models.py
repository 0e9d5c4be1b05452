"""The models of a finished run that are used, each with its tables whole in this process."""

from __future__ import annotations

from torchrec_pt.build import build_task, load_learner
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks
from torchrec_pt.learner import Learner
from torchrec_pt.runs import StageResult, finished_stages, is_of_ranking, served_stage


def only_process(ranks: Ranks, what: str) -> None:
    """Raises:
    ValueError: there are others.
    """
    if ranks.world_size > 1:
        raise ValueError(
            f"{what}: is the work of one process, given {ranks.world_size}; run it in one"
        )


def used_models(config: RunConfig, dataset: PreparedDataset) -> dict[str, StageResult]:
    """Task -> the stage that trained its model; "ranking" is the served one.

    Raises:
        ValueError: no finished run there.
    """
    finished = finished_stages(config, dataset)
    models = {"ranking": served_stage(config, dataset)}
    for task in ("ctr", "rating"):
        if stage := finished.get(f"finetune/{task}/pretrained"):
            models[task] = stage
    return models


def load_model(
    config: RunConfig, task: str, stage: StageResult, dataset: PreparedDataset, ranks: Ranks
) -> Learner:
    """One of `used_models`, on the CPU, with its head.

    Raises:
        CheckpointError: a damaged checkpoint, or one of another model or catalogue.
    """
    table = config.model.item_table.model_copy(update={"placement": "replicated"})
    model = config.model.model_copy(update={"item_table": table})
    config = config.model_copy(update={"model": model})
    has_head = task != "ranking" or is_of_ranking(stage)
    objectives = [build_task(config, task, dataset)] if has_head else []
    return load_learner(config, stage.checkpoint, dataset, ranks, objectives).cpu()
