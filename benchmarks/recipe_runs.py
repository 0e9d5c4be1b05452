"""The runs of recipes.py: which file, with which settings, into which folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from conditions import ROOT
from recipes import Comparison, Recipe

from torchrec_pt.config_file import load_config

RUNS = ROOT / "runs/reproduce"
NUM_SEEDS = 3


@dataclass(frozen=True)
class Run:
    """One training with its test.

    Attributes:
        name: its folder in runs/reproduce.
        config: a file of configs/, without .toml.
        settings: what differs from it, as --set takes it.
    """

    name: str
    config: str
    settings: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def file(self) -> Path:
        return ROOT / f"configs/{self.config}.toml"

    @property
    def overrides(self) -> list[str]:
        return [f"run_dir={self.folder}", *self.settings]

    @property
    def digest(self) -> str:
        return load_config(self.file, self.overrides).digest()

    @property
    def is_done(self) -> bool:
        mark = self.folder / "done.json"
        return mark.is_file() and json.loads(mark.read_text())["digest"] == self.digest


def recipe_run(recipe: Recipe, seed: int) -> Run:
    return Run(f"{recipe.name}-seed{seed}", recipe.name, (f"seed={seed}",))


def comparison_runs(comparison: Comparison, seed: int) -> tuple[Run, Run, Run]:
    """(pretraining, next items after it, next items alone)."""
    recipe, first = comparison.recipe, comparison.pretraining
    half = comparison.epochs // 2
    objective = json.dumps([{"name": first.name, **first.objective}])
    objective = objective.replace('": ', '" = ')  # a TOML array of tables
    # A bias by distance has other distances where attention is causal; learned positions fit both.
    fixed = (f"seed={seed}", "model.positions=learned")
    begun = Run(
        f"{recipe}-{first.name}-seed{seed}",
        recipe,
        (
            *fixed,
            f"pretrain.objectives={objective}",
            f"model.attention={first.attention}",
            f"pretrain.epochs={half}",
        ),
    )
    after = Run(
        f"{recipe}-after-{first.name}-seed{seed}",
        recipe,
        (
            *fixed,
            f"pretrain.epochs={comparison.epochs - half}",
            f"pretrain.continue_from={begun.folder / 'pretrain'}",
        ),
    )
    alone = Run(
        f"{recipe}-alone-{comparison.epochs}-seed{seed}",
        recipe,
        (*fixed, f"pretrain.epochs={comparison.epochs}"),
    )
    return begun, after, alone
