#!/usr/bin/env python3
"""Run every recipe of recipes.py over its seeds, and the comparisons; write docs/results.md.

    .venv/bin/python benchmarks/reproduce.py [--s3rec FOLDER] [--grouplens FOLDER] [--jobs 2]
        [--only NAME] [--page]

S3-Rec's folder holds Beauty.txt, LastFM.txt and what belongs to them, GroupLens' is ml-100k with
u1.test … u5.test; a recipe whose data are not there is left out. What is interrupted goes on with
the same command: a run that is done is not done again, one that was broken off resumes from its
last checkpoint. What a run reached is kept in benchmarks/results/recipes, whichever machine ran it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conditions import ROOT, commit, machine
from recipe_runs import (
    NUM_SEEDS,
    Run,
    comparison_runs,
    recipe_run,
    recipe_runs,
    variation_run,
)
from recipes import COMPARISONS, FINETUNED, RECIPES, STUDIES, Recipe
from results_page import write_page
from rich.console import Console
from run_results import METRICS, NAMES, Result

PARTS = (*RECIPES, *FINETUNED, *STUDIES)

Chain = tuple[Run, ...]  # one after the other; chains go side by side


def chains(only: str | None, data: Set[str]) -> Iterator[Chain]:
    """Everything to run on these data sets, each run once, recipes before comparisons."""
    known: set[str] = set()
    data_of = {recipe.name: recipe.data for recipe in RECIPES}

    def wanted(recipe: str) -> bool:
        return data_of[recipe] in data and only in (None, recipe)

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
    for recipe in FINETUNED:
        if recipe.data in data:
            yield from finetuned_chains(recipe, only)


def finetuned_chains(recipe: Recipe, only: str | None) -> Iterator[Chain]:
    """A recipe of fine-tuning; after each of its runs, what starts from its pretraining."""
    studies = [s for s in STUDIES if s.recipe == recipe.name and only in (None, s.name)]
    is_wanted = only in (None, recipe.name)
    num_seeds = [NUM_SEEDS] * is_wanted + [study.num_seeds for study in studies]
    for seed in range(max(num_seeds, default=0)):
        first, *other_folds = recipe_runs(recipe, seed)
        of_seed = (study for study in studies if seed < study.num_seeds)
        yield first, *(variation_run(s, v, seed) for s in of_seed for v in s.variations)
        if is_wanted and seed < NUM_SEEDS:
            yield from ((run,) for run in other_folds)


def run_chain(chain: Chain, num_threads: int, console: Console, stop: threading.Event) -> None:
    for run in chain:
        if stop.is_set() or run.is_done:
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        stages = [(stage, run) for stage in run.stages]
        if run.pretrained is not None:
            run.link_pretraining()
            if not run.has_pretraining:  # its record stayed, its folder did not
                stages = [("prepare", run.pretrained), ("pretrain", run.pretrained), *stages]
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        with (run.folder / "log.txt").open("a") as log:
            for stage, of in stages:
                command = [sys.executable, "-m", "torchrec_pt", stage, str(of.file)]
                for override in of.overrides:
                    command += ["--set", override]
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False
                ).returncode
                if code:
                    stop.set()
                    console.print(f"{run.name}: {stage} failed ({code}); see {log.name}")
                    return
        conditions = {"machine": machine("cpu"), "num_threads": num_threads, "commit": commit()}
        result = Result.of(run, conditions)
        result.save(run)
        console.print(f"{run.name}: {_in_words(run, result)}")


def _in_words(run: Run, result: Result) -> str:
    task = run.task or "ranking"
    metrics = result.tests[task]["fine-tuned" if run.task else "pretrained"]
    return "test " + ", ".join(f"{NAMES[m]} {metrics[m]:.4f}" for m in METRICS[task])


def get_data(s3rec: Path | None, grouplens: Path | None) -> None:
    """data/ml-100k, and where their folders are given, its folds, data/beauty and data/lastfm."""
    scripts = [[ROOT / "scripts/get_ml100k.py", ROOT / "data/ml-100k"]]
    if grouplens is not None:
        folds = ROOT / "data/ml-100k-folds"
        scripts.append([ROOT / "scripts/get_ml100k_folds.py", folds, "--from", grouplens])
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
    parser.add_argument("--grouplens", type=Path, metavar="FOLDER", help="with u.data, u1.test …")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--only", choices=[part.name for part in PARTS])
    parser.add_argument("--page", action="store_true", help="only write what has been run")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    stop = threading.Event()
    if not arguments.page:
        try:
            get_data(arguments.s3rec, arguments.grouplens)
        except subprocess.CalledProcessError as error:
            return int(error.returncode)
        num_threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
        data = {folder.name for folder in (ROOT / "data").iterdir()}
        todo = list(chains(arguments.only, data))
        if not todo:
            console.print(f"{arguments.only}: its data are not there; give their folder")
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
