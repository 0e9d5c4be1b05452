#!/usr/bin/env python3
"""Run every recipe of recipes.py over its seeds, and the comparisons; write docs/results.md.

    .venv/bin/python benchmarks/reproduce.py [--s3rec FOLDER] [--jobs 2] [--only NAME] [--page]

FOLDER holds S3-Rec's Beauty.txt, LastFM.txt and what belongs to them; without it only the
recipes on MovieLens-100K run. What is interrupted goes on with the same command: a run that is
done is not done again, one that was broken off resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conditions import ROOT, machine
from recipe_runs import NUM_SEEDS, Run, comparison_runs, recipe_run
from recipes import COMPARISONS, RECIPES
from results_page import write_page
from rich.console import Console

from torchrec_pt.files import write_json

STAGES = ("prepare", "pretrain", "evaluate")

Chain = tuple[Run, ...]  # one after the other; chains go side by side


def chains(only: str | None, has_s3rec: bool) -> Iterator[Chain]:
    """Everything to run, each run once, recipes before comparisons."""
    known: set[str] = set()
    data = {recipe.name: recipe.data for recipe in RECIPES}

    def wanted(recipe: str) -> bool:
        is_there = has_s3rec or data[recipe] == "ml-100k"
        return is_there and (only is None or recipe == only)

    for recipe in RECIPES:
        if wanted(recipe.name):
            for seed in range(NUM_SEEDS):
                yield (recipe_run(recipe, seed),)
    for comparison in COMPARISONS:
        if wanted(comparison.recipe):
            for seed in range(comparison.num_seeds):
                begun, after, alone = comparison_runs(comparison, seed)
                yield begun, after
                if alone.name not in known:
                    known.add(alone.name)
                    yield (alone,)


def run_chain(chain: Chain, num_threads: int, console: Console, stop: threading.Event) -> None:
    for run in chain:
        if stop.is_set() or run.is_done:
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        with (run.folder / "log.txt").open("a") as log:
            for stage in STAGES:
                command = [sys.executable, "-m", "torchrec_pt", stage, str(run.file)]
                for override in run.overrides:
                    command += ["--set", override]
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False
                ).returncode
                if code:
                    stop.set()
                    console.print(f"{run.name}: {stage} failed ({code}); see {log.name}")
                    return
        conditions = {"machine": machine("cpu"), "num_threads": num_threads}
        write_json(run.folder / "done.json", {"digest": run.digest, **conditions})
        console.print(f"{run.name}: {_in_words(run)}")


def _in_words(run: Run) -> str:
    found = json.loads((run.folder / "evaluate/result.json").read_text())
    metrics = found["ranking"]["metrics"]["pretrained"]
    return f"test HR@10 {metrics['hr@10']:.4f}, NDCG@10 {metrics['ndcg@10']:.4f}"


def get_data(s3rec: Path | None) -> None:
    """data/ml-100k, and data/beauty and data/lastfm where S3-Rec's folder is given."""
    scripts = [[ROOT / "scripts/get_ml100k.py", ROOT / "data/ml-100k"]]
    for name in ("Beauty", "LastFM") if s3rec is not None else ():
        source = next(iter(sorted(s3rec.rglob(f"{name}.txt"))), s3rec / f"{name}.txt")
        target = ROOT / "data" / name.lower()
        scripts.append([ROOT / "scripts/get_s3rec.py", target, "--from", source])
    for script in scripts:
        subprocess.run([sys.executable, *map(str, script)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--s3rec", type=Path, metavar="FOLDER", help="with Beauty.txt, LastFM.txt")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES])
    parser.add_argument("--page", action="store_true", help="only write what has been run")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    stop = threading.Event()
    if not arguments.page:
        try:
            get_data(arguments.s3rec)
        except subprocess.CalledProcessError as error:
            return int(error.returncode)
        num_threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
        todo = list(chains(arguments.only, (ROOT / "data/beauty").is_dir()))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            done = [pool.submit(run_chain, c, num_threads, console, stop) for c in todo]
            try:
                for one in done:
                    one.result()
            except KeyboardInterrupt:
                stop.set()  # the trainings got the signal, too; the same command resumes them
                console.print("interrupted; the same command goes on from here")
    console.print(f"{write_page(ROOT / 'docs/results.md')}")
    return int(stop.is_set())


if __name__ == "__main__":
    sys.exit(main())
