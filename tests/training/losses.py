"""Losses of the first steps of many small trainings; run by one process or by torchrun.

python losses.py PREPARED CASES.json OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from torchrec_pt.build import build_learner, build_objectives
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.evaluate import ModelScorer, held_out, rank_targets
from torchrec_pt.optim import Optimizers
from torchrec_pt.tasks.ranking import RankingTask

EPOCHS = 2


def train(case: dict[str, Any], dataset: PreparedDataset, ranks: Ranks) -> dict[str, Any]:
    """Mean losses of every step, and the ranks of the test items afterwards."""
    config = RunConfig.model_validate(case)
    objectives: list[nn.Module]
    if config.finetune.ranking is not None:
        settings: Any = config.finetune.ranking
        objectives = [RankingTask(settings, config.model, dataset.num_items)]
    else:
        settings = config.pretrain
        objectives = build_objectives(settings, config.model, dataset)
    built = build_learner(config, settings, objectives, dataset.num_items, ranks)
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
    return {
        "losses": losses,
        "ranks": found.values.tolist(),
    }


def main(prepared: Path, cases: Path, out: Path) -> None:
    dataset = PreparedDataset.load(prepared)
    with joined_ranks() as ranks:
        results = {
            name: train(case, dataset, ranks)
            for name, case in json.loads(cases.read_text()).items()
        }
        if ranks.is_first:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
