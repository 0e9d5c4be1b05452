"""Items and users that training never saw, on MovieLens-100K, by a model and without one.

    python benchmarks/bench_cold_start.py [--seeds 3] [--only SEED]

A tenth of the items and a tenth of the users, drawn by the seed, are held out with all of their
interactions. The model learns from the rest alone.
New items: each training user's held-out items are ranked by what the user took in training, among
the new items and among all that the user did not take in training. The model knows a new item by
its genres and year (`Recommender.embed_items(features=…)`); the others are random order, the mean
popularity of the item's genres, and content kNN: the mean cosine of the item's genres, year and
title words with those of the history's items, plain and weighted by idf.
New users: the first 80 % of what each took is the history, the rest is ranked among all that
training has; against popularity.

Writes benchmarks/results/cold_start.json; --only runs one seed and keeps the others' figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import polars as pl
import torch
from cold_split import Baselines, ColdSplit, Floats, split_log, write_log
from conditions import ROOT, conditions, default_out, write_json
from rich.console import Console
from tables import build_table

from torchrec_pt import Recommender, pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.metrics import mean_estimate, paired_difference, ranking_metrics

DATA = ROOT / "data/ml-100k"
SHARE = 0.1
KNOWN = 0.8  # of a new user's items
OURS = "torchrec_pt"
# kNN has the words of the titles besides.
READ = ("class", "release_year")
METRICS = ("ndcg@10", "hr@10")
MODEL = {
    "backbone": "autoencoder",
    "dim": 64,
    "hidden_dims": [],
    "max_length": 1000,
    "dropout": 0.0,
    "row_dropout": 0.9,
}
PRETRAIN = {
    "epochs": 60,
    "batch_size": 100,
    "learning_rate": 3e-3,
    "weight_decay": 0.5,
    "warmup_steps": 0,
    "schedule": "constant",
    "average_decay": 0.99,
    "validate_every": 20,
    "objectives": [{"name": "autoencoder", "loss": "multinomial", "corruption": 0.5}],
}


@dataclass(frozen=True)
class Question:
    """Of U people: what they took before, what they took then, and what is ranked.

    Attributes:
        histories, targets: item ids.
        candidates: item ids, of which each one's history is taken out.
    """

    name: str
    histories: list[list[int]]
    targets: list[list[int]]
    candidates: list[int]


def train(split: ColdSplit, seed: int, folder: Path) -> Recommender:
    write_log(split, folder / "log")
    config = RunConfig.model_validate(
        {
            "run_dir": folder / "run",
            "seed": seed,
            "data": {
                "format": "recbole",
                "path": folder / "log",
                "columns": {"timestamp": "timestamp"},
                "features": [
                    {"column": name, "of": "item", "kind": "categorical"} for name in READ
                ],
            },
            "model": MODEL,
            "pretrain": PRETRAIN,
        }
    )
    pipeline.prepare(config)
    pipeline.pretrain(config)
    return Recommender.load(config.run_dir)


def questions(split: ColdSplit) -> list[Question]:
    took: dict[int, list[int]] = {}
    for user, item in split.log.select("user_id", "item_id").iter_rows():
        took.setdefault(user, []).append(item)
    asked = [user for user in split.taken if user in took]
    histories = [took[user] for user in asked]
    targets = [split.taken[user] for user in asked]
    warm = sorted({item for items in took.values() for item in items})
    new = {user: int(KNOWN * len(items)) for user, items in split.cold_users.items()}
    halves = [(items[: new[user]], items[new[user] :]) for user, items in split.cold_users.items()]
    before, then = zip(*(both for both in halves if all(both)), strict=True)
    return [
        Question("new items among new items", histories, targets, split.cold_items),
        Question("new items among all", histories, targets, warm + split.cold_items),
        Question("new users", list(before), list(then), warm),
    ]


def ours(recommender: Recommender, split: ColdSplit, question: Question) -> Floats:
    """(U, all items in the order of `split.items`) scores; NaN where the model has no vector."""
    known = recommender.dataset.items["external_id"].to_list()
    vectors = dict(zip(known, recommender.embed_items(), strict=True))
    words = split.items.filter(pl.col("item_id").is_in(split.cold_items)).select(READ)
    new = recommender.embed_items(features=words.to_dicts())
    vectors |= dict(zip(split.cold_items, new, strict=True))
    users = recommender.embed_users(histories=question.histories)
    nothing = np.full(users.shape[1], np.nan)
    return users @ np.stack([vectors.get(item, nothing) for item in split.items["item_id"]]).T


def evaluate(scores: Floats, question: Question, place: dict[int, int]) -> dict[str, torch.Tensor]:
    """Metric -> (U,), by the ranks of the targets among the candidates."""
    out = np.full(scores.shape[1], -np.inf)
    out[[place[item] for item in question.candidates]] = 0
    ranks = []
    for row, history, targets in zip(scores, question.histories, question.targets, strict=True):
        row = np.nan_to_num(row) + out
        row[[place[item] for item in history]] = -np.inf
        order = np.argsort(-row, kind="stable")
        at = np.empty(len(row), dtype=np.int64)
        at[order] = np.arange(1, len(row) + 1)
        ranks.append(torch.from_numpy(at[[place[item] for item in targets]]))
    lengths = torch.tensor([len(each) for each in ranks])
    found = ranking_metrics(Jagged.from_lengths(torch.cat(ranks), lengths), [10])
    return {name: found[name] for name in METRICS}


def run_seed(seed: int, console: Console) -> dict[str, Any]:
    split = split_log(DATA, seed, SHARE)
    baselines, draw = Baselines(split), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name, joined_ranks():
        started = time.monotonic()
        recommender = train(split, seed, Path(name))
        seconds = time.monotonic() - started
        found: dict[str, Any] = {"train_s": round(seconds, 1)}
        for question in questions(split):
            scores = baselines.scores(question.histories) | {
                "random": draw.random((len(question.histories), split.items.height)),
                OURS: ours(recommender, split, question),
            }
            if question.name == "new users":  # of these alone popularity is asked for
                scores = {key: scores[key] for key in ("popularity", OURS)}
            each = {
                contestant: evaluate(rows, question, baselines.place)
                for contestant, rows in scores.items()
            }
            found[question.name] = summary(each)
    console.print(f"seed {seed}: {found['train_s']} s of training")
    return found


def summary(each: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Means, and how far ours is from each contestant, ± its 95 % interval paired over users."""
    return {
        contestant: {
            name: {
                "mean": round(float(values.mean()), 4),
                "ours_above": [
                    round(x, 4)
                    for x in paired_difference(
                        mean_estimate(each[OURS][name]), mean_estimate(values)
                    )
                ],
            }
            for name, values in metrics.items()
        }
        for contestant, metrics in each.items()
    }


def report(seeds: dict[str, dict[str, Any]], console: Console) -> None:
    results = list(seeds.values())
    for question in (name for name in results[0] if name != "train_s"):
        table = build_table(
            f"{question}: mean of {len(results)} seeds",
            *("contestant", "NDCG@10", "HR@10", "seeds where ours is above in NDCG@10"),
            text_columns=("contestant",),
        )
        for contestant in results[0][question]:
            values = [
                mean(result[question][contestant][name]["mean"] for result in results)
                for name in METRICS
            ]
            above = [
                result[question][contestant]["ndcg@10"]["ours_above"][0] > 0 for result in results
            ]
            won = "" if contestant == OURS else f"{sum(above)} of {len(above)}"
            table.add_row(contestant, *(f"{value:.4f}" for value in values), won)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="this seed alone")
    parser.add_argument("--out", type=Path, default=default_out("cold_start"))
    arguments = parser.parse_args()
    if not (DATA / "ml-100k.inter").is_file():
        parser.error(f"{DATA}: holds no MovieLens-100K; run make data")
    torch.set_num_threads(1)
    console = Console(width=max(Console().width, 120))
    header = conditions("cpu")
    seeds: dict[str, dict[str, Any]] = {}
    for seed in range(arguments.seeds) if arguments.only is None else [arguments.only]:
        found = run_seed(seed, console)
        if arguments.only is not None and arguments.out.with_suffix(".json").exists():
            seeds = json.loads(arguments.out.with_suffix(".json").read_text())["seeds"]
        seeds[str(seed)] = found
        settings = {"model": MODEL, "pretrain": PRETRAIN, "share": SHARE, "known": KNOWN}
        write_json(arguments.out, header, settings | {"seeds": dict(sorted(seeds.items()))})
    report(seeds, console)


if __name__ == "__main__":
    main()
