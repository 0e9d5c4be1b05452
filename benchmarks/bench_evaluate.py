"""Full-catalogue evaluation beside RecBole's, of Beauty: users a second, and memory.

    python benchmarks/bench_evaluate.py [--beauty FOLDER] [--rounds 3] [--quick]

FOLDER is what scripts/get_s3rec.py writes: 22,363 users, each of whom has one test item among
12,101 items. SASRec of 2 layers, dim 64, length 50 with initial values, one thread each, in turns;
from the data in memory to HR, NDCG and MRR at 5 and 10.

- RecBole's Trainer.evaluate in mode full, in its environment (`make peers`), with its default batch
  of 4096 users, and with smaller ones, which are faster.
- Ours with its default of 256: evaluate_turns.py says what "ranks" and "lists" are.

What differs: ours has the rank of every test item, and leaves out what a user took before, which
RecBole does not where it ranks for sequences; RecBole's MRR is cut at k.

Writes benchmarks/results/evaluate.json; of --quick only where --out says.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
from bars import at_least, without_bound
from conditions import ROOT, conditions
from contestants import Contestant
from evaluate_turns import WAYS
from peers.environments import python_of
from turns import parsed, ratios_to, report, take_turns, turns_parser

BENCHMARKS = ROOT / "benchmarks"
DEFAULT_BATCH, OTHER_BATCHES = 4096, (64, 512)
NUM_USERS_QUICK = 1000


def main() -> None:
    parser = turns_parser(__doc__, "evaluation", rounds=3)
    parser.add_argument("--beauty", type=Path, default=ROOT / "data/beauty")
    arguments = parsed(parser, "evaluate")
    log = arguments.beauty / "beauty.inter"
    if not log.exists():
        print(f"{log}: not there, nothing is measured; scripts/get_s3rec.py writes it")
        return
    header = conditions("cpu") | {"peer": "RecBole 1.2.1"}
    others = () if arguments.quick else OTHER_BATCHES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "beauty"
        write_with_times(log, data, NUM_USERS_QUICK if arguments.quick else None)
        ours = Contestant(BENCHMARKS / "evaluate_turns.py", data, folder / "run")
        peer = Contestant(
            BENCHMARKS / "peers/recbole_evaluate.py",
            data,
            python=python_of("recbole"),
            PYTHONPATH=BENCHMARKS,
            PYTHONWARNINGS="ignore",
        )
        sizes = {"ours": ours.answer(), "RecBole": peer.answer()}
        peers = {f"RecBole, {size} users": (peer, str(size)) for size in (DEFAULT_BATCH, *others)}
        entrants = peers | {f"ours, {way}": (ours, way) for way in WAYS}
        rows = take_turns(entrants, 1 if arguments.quick else arguments.rounds)
    best = max((row for row in rows if row.name in peers), key=lambda row: row.per_s).name
    to_best, to_default = ratios_to(rows, best), ratios_to(rows, f"RecBole, {DEFAULT_BATCH} users")
    text = "users a second over RecBole's at"
    bars = [
        at_least(f"{text} its default batch", 5, [(to_default["ours, ranks"], "ours, ranks")]),
        at_least(f"{text} its best batch", 5, [(to_best["ours, ranks"], f"ours, ranks; {best}")]),
        without_bound(f"{text} its default batch", [(to_default["ours, lists"], "ours, lists")]),
        without_bound(f"{text} its best batch", [(to_best["ours, lists"], "ours, lists")]),
    ]
    ratios = {"ratios_to_best": to_best, "ratios_to_default": to_default}
    title = "evaluation over the full catalogue"
    report(title, "users", rows, bars, arguments, header, models=sizes, **ratios)


def write_with_times(inter: Path, folder: Path, num_users: int | None) -> None:
    """RecBole's log of the first users, or all: their order as the times that it sorts by."""
    folder.mkdir()
    log = pl.read_csv(inter, separator="\t", infer_schema=False)
    if num_users is not None:
        kept = log["user_id:token"].unique(maintain_order=True).head(num_users)
        log = log.filter(pl.col("user_id:token").is_in(kept.to_list()))
    times = log.with_row_index("timestamp:float").select(*log.columns, "timestamp:float")
    times.write_csv(folder / f"{folder.name}.inter", separator="\t")


if __name__ == "__main__":
    main()
