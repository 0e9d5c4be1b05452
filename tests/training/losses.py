"""Losses of the first steps of many small trainings; run by one process or by torchrun.

python losses.py PREPARED CASES.json OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from torchrec_pt.build import build_learner, build_objectives, build_task
from torchrec_pt.config import RunConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.evaluate import held_out, predict_pairs, rank_targets
from torchrec_pt.optim import Optimizers
from torchrec_pt.scoring import ModelScorer
from torchrec_pt.tasks.pairs import PairTask, held_out_pairs

EPOCHS = 2


def train(case: dict[str, Any], dataset: PreparedDataset, ranks: Ranks) -> dict[str, Any]:
    """Mean losses of every step, and the ranks of the test items afterwards."""
    config = RunConfig.model_validate(case)
    settings: TrainConfig
    objectives: list[nn.Module]
    if config.finetune.tasks:
        ((name, settings),) = config.finetune.tasks.items()
        objectives = [build_task(config, name, dataset)]
    else:
        assert config.pretrain is not None
        settings = config.pretrain
        objectives = build_objectives(config, dataset)
    built = build_learner(config, settings, objectives, dataset, ranks)
    loader = HistoryLoader(
        dataset.history("train"),
        batch_size=settings.batch_size,
        max_length=config.model.max_length,
        seed=config.seed,
        ranks=ranks,
    )
    optimizers = Optimizers(built.model, settings, built.placement, 100)
    losses = []
    step = 0
    for epoch in range(EPOCHS):
        for rows in loader.steps(epoch):
            optimizers.prepare(step)
            out = built.model(built.learner.draw(rows))
            out.loss.backward()
            optimizers.step()
            losses.append(out.means.tolist())
            step += 1
    backbone = built.learner.backbone.eval()
    scorer = ModelScorer(backbone, dataset.history("valid"), ranks)
    asked = held_out(dataset, "test")
    found = rank_targets(scorer, asked, dataset.num_items, ranks, batch_size=7)
    result = {"losses": losses, "ranks": found.values.tolist()}
    if isinstance(objectives[0], PairTask):
        pairs = held_out_pairs(dataset, "test")
        predictions = predict_pairs(built.learner, objectives[0], pairs, ranks, batch_size=7)
        result["predictions"] = predictions.tolist()
    return result


def main(prepared: Path, cases: Path, out: Path) -> None:
    dataset = PreparedDataset.load(prepared)
    with joined_ranks() as ranks:
        results = {
            name: train(case, dataset, ranks)
            for name, case in json.loads(cases.read_text()).items()
        }
        if ranks.is_first:
            out.write_text(json.dumps(results))
    tasks = Path("/proc/self/task").glob("*/comm")  # none but on Linux
    alive = [task.read_text().strip() for task in tasks]
    # One that ended with the interpreter aborted the process about once in fifteen runs.
    assert not [name for name in alive if "gloo" in name], alive


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
