"""The runs of recipes.py: which file, with which settings, into which folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from conditions import ROOT
from recipes import FINETUNED, Comparison, Recipe, Study, Variation

from torchrec_pt.config_file import load_config

# Relative to ROOT, where the runs are started, so that a digest is the same on every machine.
RUNS = Path("runs/reproduce")
# Of what was run, a file a run, kept with the code: a page is written from these alone.
RECORDS = ROOT / "benchmarks/results/recipes"
NUM_SEEDS = 3


@dataclass(frozen=True)
class Run:
    """One training with its test.

    Attributes:
        name: its folder in runs/reproduce.
        config: a file of configs/, without .toml.
        settings: what differs from it, as --set takes it.
        task: what it is fine-tuned for; None: it is pretrained alone.
        pretrained: the run whose pretraining, which must be of the same settings, it takes for its
            own.
    """

    name: str
    config: str
    settings: tuple[str, ...]
    task: str | None = None
    pretrained: Run | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        pretrain = () if self.pretrained else ("pretrain",)
        finetune = ("finetune",) if self.task else ()
        return ("prepare", *pretrain, *finetune, "evaluate")

    @property
    def folder(self) -> Path:
        return ROOT / RUNS / self.name

    @property
    def record(self) -> Path:
        return RECORDS / f"{self.name}.json"

    @property
    def file(self) -> Path:
        return ROOT / f"configs/{self.config}.toml"

    @property
    def overrides(self) -> list[str]:
        return [f"run_dir={RUNS / self.name}", *self.settings]

    @property
    def digest(self) -> str:
        """Of all that what it reached may depend on; it exports nothing."""
        return load_config(self.file, self.overrides).digest(exclude=frozenset({"export"}))

    @property
    def is_done(self) -> bool:
        """By the same settings; the record says which commit they were run with."""
        if not self.record.is_file():
            return False
        return bool(json.loads(self.record.read_text())["digest"] == self.digest)

    @property
    def has_pretraining(self) -> bool:
        return (self.folder / "pretrain/result.json").is_file()

    def link_pretraining(self) -> None:
        """Put the pretraining of the other run where this one's would be.

        Fine-tuning takes it only if its fingerprint is that of this run's configuration and data.
        """
        assert self.pretrained is not None
        link = self.folder / "pretrain"
        if not link.is_symlink():
            link.symlink_to(Path("..") / self.pretrained.name / "pretrain")


def recipe_run(recipe: Recipe, seed: int) -> Run:
    """Of the first fold where there are several."""
    return recipe_runs(recipe, seed)[0]


def recipe_runs(recipe: Recipe, seed: int) -> list[Run]:
    """One, or one a fold; with the scratch control where it is fine-tuned."""
    control = (f"finetune.{recipe.task}.control=scratch",) if recipe.task else ()
    return [
        Run(
            "-".join(filter(None, (recipe.name, f"seed{seed}", fold))),
            recipe.name,
            (*_settings(recipe, seed, fold), *control),
            recipe.task,
        )
        for fold in recipe.folds or ("",)
    ]


def variation_run(study: Study, variation: Variation, seed: int) -> Run:
    """On the first fold where there are several."""
    recipe = next(recipe for recipe in FINETUNED if recipe.name == study.recipe)
    fold = recipe.folds[0] if recipe.folds else ""
    return Run(
        f"{recipe.name}-{variation.name}-seed{seed}",
        recipe.name,
        (*_settings(recipe, seed, fold), *variation.settings),
        recipe.task,
        pretrained=recipe_run(recipe, seed),
    )


def _settings(recipe: Recipe, seed: int, fold: str) -> tuple[str, ...]:
    of_fold = (f"data.path=data/{recipe.data}/{fold}",) if fold else ()
    return (f"seed={seed}", *of_fold)


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
            f"pretrain.continue_from={RUNS / begun.name / 'pretrain'}",
        ),
    )
    alone = Run(
        f"{recipe}-alone-{comparison.epochs}-seed{seed}",
        recipe,
        (*fixed, f"pretrain.epochs={comparison.epochs}"),
    )
    return begun, after, alone
