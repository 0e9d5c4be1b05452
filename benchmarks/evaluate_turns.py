"""Ours in bench_evaluate.py: the test users of Beauty over the full catalogue, a way a word.

As a program it prepares the data of its two arguments, RecBole's folder and one of its own, and
takes turns with a fresh SASRec, from the prepared dataset in memory to the metrics:

    ranks   the ranks of the test items, and what they give: HR, NDCG, MRR and others at 5 and 10
    lists   besides them the ten best items of every user, as `torchrec-pt evaluate` wants them
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from conditions import ROOT
from contestants import take_turns_asked
from turn_costs import costs_of

from torchrec_pt import pipeline
from torchrec_pt.build import build_learner
from torchrec_pt.config_file import load_config
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.held_out import held_out, rank_and_list
from torchrec_pt.metrics import ranking_metrics
from torchrec_pt.scoring import ModelScorer

KS = (5, 10)
WAYS = {"ranks": 0, "lists": max(KS)}  # items of each user's list


def main() -> None:
    data, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    # RecBole's SASRec has neither attributes nor a cosine.
    others = ("data.features=[]", "model.similarity=inner")
    path = ROOT / "configs/beauty_next_item.toml"
    config = load_config(path, (f"data.path={data}", f"run_dir={folder}", *others))
    assert config.pretrain is not None
    pipeline.prepare(config)
    dataset = PreparedDataset.load(config.prepared_dir)
    with joined_ranks() as ranks:
        built = build_learner(config, config.pretrain, [], dataset, ranks)
        built.model.eval()

        def evaluate(k: int) -> None:
            asked = held_out(dataset, "test")
            scorer = ModelScorer(built.learner.backbone, dataset.history("valid"), ranks)
            found = rank_and_list(
                scorer,
                asked,
                dataset.part_of_user[asked.users],
                dataset.num_items,
                ranks,
                config.evaluate.batch_size,
                k=k,
            )
            ranking_metrics(found.ranks, KS)

        def turn(way: str) -> dict[str, Any]:
            return {"num": num_users, **costs_of(lambda: evaluate(WAYS[way]))}

        num_users = len(held_out(dataset, "test").users)
        take_turns_asked(
            {
                "users": num_users,
                "items": dataset.num_items,
                "batch_size": config.evaluate.batch_size,
                "parameters": sum(p.numel() for p in built.model.parameters()),
            },
            turn,
        )


if __name__ == "__main__":
    main()
