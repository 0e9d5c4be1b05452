"""SASRec: how fast it trains, and how soon it is as good as RecTools' at its best.

    python benchmarks/bench_sasrec.py [--beauty FOLDER] [--rounds 3] [--quick] [--only speed|reach]

- Ours by `torchrec-pt pretrain benchmarks/sasrec.toml`, RecTools by peers/rectools_sasrec.py in its
  environment (`make peers`), of one thread each, on MovieLens-100K and, where scripts/get_s3rec.py
  has written it, on Amazon Beauty. Batch 128.
- speed: the same model, sequences a second of the training of an epoch, wall time; each in a
  process of its own, in turns, and its first epoch left out where there are several.
- reach: NDCG@10 of the validation items over the catalogue after every epoch, validations in the
  times. Of RecTools the best of 160 epochs and the time to it (of Beauty, where an epoch takes it
  minutes, of as many as --beauty-epochs says, by default none); ours with the loss, the rate and
  the batch of our recipes, over three seeds, till it is as good. The worst seed counts.

Writes benchmarks/results/sasrec.json; a part of the benchmark only where --out says, beside what
stands there of the other.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bars import Bar, at_least, bar_table
from conditions import ROOT, build_parser, conditions, default_out, write_json
from peers.environments import python_of
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchrec_pt.data.dataset import PreparedDataset

SECTIONS = ("speed", "reach")
BATCH_SIZE = 128  # of sasrec.toml and of the peer
CONFIG = ROOT / "benchmarks/sasrec.toml"
PEER = ROOT / "benchmarks/peers/rectools_sasrec.py"


@dataclass(frozen=True)
class Validation:
    """NDCG@10 so many seconds after training began."""

    at_s: float
    ndcg: float


@dataclass(frozen=True)
class Data:
    """A data set, and what is measured on it.

    Attributes:
        inter: RecBole's atomic file; torchrec_pt reads its folder.
        columns: override for the columns that sasrec.toml does not name.
        epochs, peer_epochs, peer_steps: of a turn of speed; RecTools' epochs may be of so many
            steps alone.
        recipe: what ours trains with in reach, beside sasrec.toml.
        peer_reach_epochs: within which RecTools' best counts; 0 for no reach.
        bars: at least so many times the sequences a second; so many times as soon.
    """

    name: str
    inter: Path
    columns: tuple[str, ...]
    epochs: int
    peer_epochs: int
    peer_steps: int | None
    recipe: tuple[str, ...]
    peer_reach_epochs: int
    bars: tuple[float, float]


def data_sets(beauty: Path, beauty_epochs: int, is_quick: bool) -> list[Data]:
    cosine = (
        "model.similarity=cosine",
        "pretrain.objectives.0.temperature=0.07",
        "pretrain.learning_rate=2e-3",
    )
    ml100k = Data(
        name="MovieLens-100K",
        inter=ROOT / "data/ml-100k/ml-100k.inter",
        columns=('data.columns={timestamp="timestamp"}',),
        epochs=5,
        peer_epochs=4,
        peer_steps=None,
        recipe=(*cosine, "pretrain.batch_size=32", "model.dropout=0.3", "pretrain.epochs=40"),
        peer_reach_epochs=160,
        bars=(2.0, 4.0),
    )
    if is_quick:
        return [replace(ml100k, epochs=2, peer_epochs=2, peer_reach_epochs=2)]
    if not (beauty / "beauty.inter").exists():
        print(
            f"{beauty}: has no beauty.inter, so Beauty is left out; scripts/get_s3rec.py writes it"
        )
        return [ml100k]
    return [
        ml100k,
        Data(
            name="Beauty",
            inter=beauty / "beauty.inter",
            columns=(),
            epochs=3,
            peer_epochs=2,
            peer_steps=10,
            recipe=(*cosine, "pretrain.batch_size=256", "model.dropout=0.5", "pretrain.epochs=20"),
            peer_reach_epochs=beauty_epochs,
            bars=(4.0, 4.0),
        ),
    ]


# --- ours ------------------------------------------------------------------------------------


def train(data: Data, run_dir: Path, *overrides: str) -> EventAccumulator:
    """A new pretraining in a process of its own; its TensorBoard events, which tell the time."""
    shutil.rmtree(run_dir / "pretrain", ignore_errors=True)
    values = (f"data.path={data.inter.parent}", f"run_dir={run_dir}", *data.columns, *overrides)
    options = [part for value in values for part in ("--set", value)]
    for stage in ("prepare", "pretrain"):
        command = [sys.executable, "-m", "torchrec_pt", stage, str(CONFIG), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = EventAccumulator(str(run_dir / "pretrain/tensorboard"), size_guidance={"scalars": 0})
    return events.Reload()


def num_sequences_of(run_dir: Path) -> int:
    """Users that train, as the prepared dataset counts them."""
    dataset = PreparedDataset.load(run_dir / "prepared")
    return int((dataset.history("train").lengths > 0).sum())


def speeds(data: Data, run_dir: Path) -> list[float]:
    """Sequences a second of all epochs but the first, whose start no step's event tells."""
    events = train(data, run_dir, f"pretrain.epochs={data.epochs}", "pretrain.validate_every=1000")
    num_sequences = num_sequences_of(run_dir)
    steps = -(-num_sequences // BATCH_SIZE)
    ends = [event.wall_time for event in events.Scalars("loss/next_item")][steps - 1 :: steps]
    return [num_sequences / (end - begin) for begin, end in itertools.pairwise(ends)]


def validations(data: Data, run_dir: Path, seed: int) -> list[Validation]:
    events = train(data, run_dir, *data.recipe, "pretrain.validate_every=1", f"seed={seed}")
    first, *later = events.Scalars("valid/ndcg@10")  # the first is of the untrained model
    return [Validation(event.wall_time - first.wall_time, event.value) for event in later]


# --- RecTools --------------------------------------------------------------------------------


def peer_epochs(data: Data, epochs: int, *options: str) -> tuple[int, list[dict[str, float]]]:
    """How many sequences it trains on, and what it says of each epoch."""
    command = [str(python_of("rectools")), str(PEER), str(data.inter), "--epochs", str(epochs)]
    said = subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout
    first, *each = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return first["sequences"], each


# --- both ------------------------------------------------------------------------------------


def measure_speed(data: Data, run_dir: Path, rounds: int) -> dict[str, Any]:
    """Sequences a second of each epoch, by turns, and the ratio of the medians."""
    found: dict[str, list[float]] = {"ours": [], "rectools": []}
    steps = ("--steps", str(data.peer_steps)) if data.peer_steps else ()
    for _ in range(rounds):
        num_sequences, epochs = peer_epochs(data, data.peer_epochs, *steps)
        found["rectools"] += [num_sequences / epoch["seconds"] for epoch in epochs[1:]]
        found["ours"] += speeds(data, run_dir)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "sequences": num_sequences_of(run_dir),
        "of_epochs": found,
        "sequences_per_s": medians,
        "ratio": medians["ours"] / medians["rectools"],
    }


def measure_reach(data: Data, run_dir: Path, seeds: int) -> dict[str, Any]:
    """RecTools' best of one run, and when each of our runs was as good, or null."""
    _, epochs = peer_epochs(data, data.peer_reach_epochs, "--validate")
    theirs = [Validation(epoch["at"], epoch["ndcg@10"]) for epoch in epochs]
    best = max(theirs, key=lambda validation: validation.ndcg)
    ours = [validations(data, run_dir, seed) for seed in range(seeds)]
    found = [next((v.at_s for v in run if v.ndcg >= best.ndcg), None) for run in ours]
    reached = [at for at in found if at is not None]
    return {
        "best": asdict(best),
        "best_epoch": theirs.index(best) + 1,
        "reached_s": found,
        "ratio": best.at_s / max(reached) if len(reached) == len(found) else None,
        "curves": {
            "rectools": [[asdict(v) for v in theirs]],
            "ours": [[asdict(v) for v in run] for run in ours],
        },
    }


def bars_of(data: Data, measured: dict[str, Any]) -> list[Bar]:
    texts = ("sequences a second, ours / RecTools'", "time to RecTools' best, RecTools' / ours")
    return [
        at_least(f"{data.name}: {text}", bar, [(measured[part]["ratio"] or 0.0, data.name)])
        for part, text, bar in zip(SECTIONS, texts, data.bars, strict=True)
        if part in measured
    ]


def main() -> None:
    parser = build_parser(__doc__, SECTIONS, rounds_help="turns of speed, seeds of reach")
    parser.add_argument(
        "--beauty", type=Path, default=ROOT / "data/beauty", help="folder with beauty.inter"
    )
    parser.add_argument(
        "--beauty-epochs", type=int, default=0, help="of RecTools in reach, minutes each"
    )
    parser.set_defaults(rounds=3, device="cpu")
    arguments = parser.parse_args()
    if arguments.out is None and not (arguments.quick or arguments.only):
        arguments.out = default_out("sasrec")
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(arguments.threads)  # which the header says
    header = conditions("cpu") | {"peer": "RecTools 0.19.0", "batch_size": BATCH_SIZE}
    results = standing(arguments.out)
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        for data in data_sets(arguments.beauty, arguments.beauty_epochs, arguments.quick):
            parts = results.setdefault(data.name, {})
            run_dir = Path(folder) / data.name
            if arguments.only != "reach":
                found = measure_speed(data, run_dir, arguments.rounds)
                parts["speed"] = found | {"header": header}
            if arguments.only != "speed" and data.peer_reach_epochs:
                found = measure_reach(data, run_dir, arguments.rounds)
                parts["reach"] = found | {"header": header}
            bars += bars_of(data, parts)
    Console().print(bar_table(bars))
    if arguments.out is not None:
        write_json(arguments.out, header, {"data": results, "bars": [asdict(bar) for bar in bars]})


def standing(out: Path | None) -> dict[str, Any]:
    """What an earlier run left there: parts that are not measured now stay."""
    path = None if out is None else out.with_suffix(".json")
    if path is None or not path.exists():
        return {}
    data: dict[str, Any] = json.loads(path.read_text())["data"]
    return data


if __name__ == "__main__":
    main()
