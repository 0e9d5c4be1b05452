"""Runs configurations, and then evaluates, exports and asks each on other numbers of ranks.

python any_ranks.py OUT CASES.json
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from torchrec_pt import ItemFilter, Recommender, pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.data.errors import DataError


def _work(rank: int, num_ranks: int, store: str, config: RunConfig, user: str, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    if num_ranks == 1:
        pipeline.run(config)
    else:
        pipeline.evaluate(config)
        pipeline.export_run(config)
    offered = [pipeline.recommend(config, asked, 10) for asked in (None, user)]
    with pytest.raises(DataError, match="nobody"):
        pipeline.recommend(config, "nobody", 1)
    recommender = Recommender.load(config.run_dir)
    first, items = recommender.first_user, recommender.dataset.items["external_id"].to_list()[:6]
    offered.append(
        [
            recommender.recommend(user, k=4, diversity=0.5, explain=True),
            [[one.item for one in each] for each in recommender.recommend_many([user, first])],
            recommender.similar_items(items[0], filter=ItemFilter(without=items[1:3])),
            recommender.score(items, user=user, task="ranking"),
            recommender.score(items, user=user),
            recommender.predict_rating(items, history=items[2:]),
            recommender.embed_items(items).tolist(),
        ]
    )
    if rank == 0:
        for folder in ("evaluate", "export"):
            shutil.copytree(config.run_dir / folder, out / folder)
        (out / "recommend.json").write_text(json.dumps(offered, default=vars))
    dist.destroy_process_group()


def main(out: Path, cases: dict[str, dict[str, Any]]) -> None:
    """OUT/NAME/NUM_RANKS for each case {"config", "user"} and number of ranks in "ranks", 1 first.

    Forks, since torch is slow to import.
    """
    for name, case in cases.items():
        config = RunConfig.model_validate(case["config"])
        for num_ranks in case["ranks"]:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.start_processes(
                    _work,
                    (
                        num_ranks,
                        f"{folder}/store",
                        config,
                        case["user"],
                        out / name / str(num_ranks),
                    ),
                    nprocs=num_ranks,
                    start_method="fork",
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
