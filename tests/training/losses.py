"""Losses and tables of many small trainings; run by one process or by torchrun.

python losses.py PREPARED CASES.json OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_pt import checkpoint
from torchrec_pt.build import build_learner, build_task
from torchrec_pt.checkpoint import Checkpoint, parts_of
from torchrec_pt.config import RunConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks, gather_objects, joined_ranks
from torchrec_pt.held_out import gather_by_user, held_out, predict_pairs, rank_targets
from torchrec_pt.objectives.build import build_objectives
from torchrec_pt.optim import Optimizers
from torchrec_pt.plan import table_plans
from torchrec_pt.saver import Saver
from torchrec_pt.scoring import ModelScorer, head_of
from torchrec_pt.tasks.pairs import PairTask
from torchrec_pt.transfer import model_tensors, optimizer_tensors
from torchrec_pt.validation import gather_judged

EPOCHS = 2


def train(case: dict[str, Any], dataset: PreparedDataset, ranks: Ranks) -> dict[str, Any]:
    """Mean losses of every step, the tables, and the ranks of the test items afterwards.

    Args:
        case: "config"; "save", a folder for a checkpoint after the first epoch; "load", such a
            folder to go on from (which ends without the test items).
    """
    config = RunConfig.model_validate(case["config"])
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
        dataset,
        batch_size=settings.batch_size,
        max_length=config.model.max_length,
        seed=config.seed,
        ranks=ranks,
        with_impressions=isinstance(objectives[0], PairTask),
    )
    optimizers = Optimizers(built.model, settings, built.placement, 100)
    before = whole_tables(built.model.state_dict())
    tensors = model_tensors(built.model) | optimizer_tensors(optimizers)
    items = dataset.items["external_id"]
    losses = []
    first, step = 0, 0
    if "load" in case:
        (path,) = checkpoint.saved(Path(case["load"]))
        Checkpoint.open(path, ranks).load(tensors, items)
        first, step = 1, loader.steps_per_epoch
    for epoch in range(first, EPOCHS):
        if epoch == 1 and "save" in case:
            with Saver(Path(case["save"]), items, ranks, keep_last=1, in_background=False) as saver:
                saver.save(step, tensors, {}, best_step=step)
        for rows in loader.steps(epoch):
            optimizers.prepare(step)
            out = built.model(built.learner.draw(rows))
            out.loss.backward()
            optimizers.step()
            losses.append(out.means.tolist())
            step += 1
    state = optimizers.state()
    (item_plan,) = (p for p in table_plans(built.model, state) if p.table == "item")
    result: dict[str, Any] = {
        "losses": losses,
        "before": before,
        "after": whole_tables(built.model.state_dict()),
        "state": whole_tables(state),
        "plan": [item_plan.kind, len(item_plan.ranks)],
    }
    if "load" in case:
        return result
    backbone = built.learner.backbone.eval()
    head = head_of(built.learner)
    scorer = ModelScorer(backbone, dataset.history("valid"), ranks, head)
    asked = held_out(dataset, "test")
    parts = dataset.part_of_user[asked.users]
    found = rank_targets(scorer, asked, parts, dataset.num_items, ranks, batch_size=7)
    users = dataset.user_ids[asked.users]
    result["ranks"] = gather_by_user(users, [found], ranks)[1][0].values.tolist()
    if isinstance(objectives[0], PairTask):
        pairs = objectives[0].held_out("test")
        parts = dataset.part_of_user[pairs.users]
        predictions = predict_pairs(built.learner, objectives[0], pairs, parts, ranks, 7)
        judged = gather_judged(dataset, objectives[0], pairs, {"": predictions}, ranks)
        result["predictions"] = judged.predictions[""].tolist()
    return result


def whole_tables(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """TorchRec's tables and their optimizer state, put together from the parts of all ranks."""
    parts = {
        name: [(offsets, part.tolist()) for offsets, part in parts_of(value)]
        for name, value in tensors.items()
        if ".embeddings." in name or ".embedding_bags." in name
    }
    of_ranks = gather_objects(parts)
    sizes = {name: tuple(tensors[name].size()) for name in parts}
    all_sizes = {name: size for held in gather_objects(sizes) for name, size in held.items()}
    tables = {}
    for name, size in all_sizes.items():
        whole = torch.full(size, torch.nan)
        for held in of_ranks:
            for offsets, values in held.get(name, ()):
                part = torch.tensor(values)
                ends = zip(offsets, part.shape, strict=True)
                whole[tuple(slice(at, at + num) for at, num in ends)] = part
        tables[name] = whole.tolist()
    return tables


def main(prepared: Path, cases: Path, out: Path) -> None:
    with joined_ranks() as ranks:
        dataset = PreparedDataset.load(prepared, ranks)
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
