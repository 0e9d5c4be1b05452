"""README.md of a package: what the model is, what it learned from, how good it is, how to use it.

In the form that the Hugging Face hub reads: YAML between two lines of dashes, then Markdown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import torch

from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.manifest import Manifest
from torchrec_pt.files import whole_file
from torchrec_pt.metrics import Estimate, click_metrics, mean_estimate, rating_metrics
from torchrec_pt.runs import StageResult, finished_stages, is_of_ranking, served_stage

# Metrics of each task that a card shows, by what their names begin with.
SHOWN = {
    "ranking": ("ndcg@", "hr@", "mrr"),
    "ctr": ("auc", "gauc", "logloss", "calibration"),
    "rating": ("rmse", "mae"),
}
USE = """## Intended use

Items for known users, for anybody with a history of these items, and items like an item; where a
task is listed above, clicks or ratings of a user and an item. It knows this catalogue alone.

```python
from torchrec_pt import Recommender

recommender = Recommender.from_pretrained("this folder")
recommender.recommend({user}, k=5)
recommender.recommend(history=[{item}], k=5, explain=True)
```

## Limits

- Scores rank the items for one user; they are no probabilities and do not compare users.
- What was often taken in training is offered more often. Nothing here measures whether that, or
  anything else about the lists, is fair to users or to who made the items.
- Test figures are of interactions held out of this log (split: {split}); a live system differs.
- The package holds the prepared log: who took what, by external id; for those who may see it.
{cold}"""


def write_card(
    path: Path, config: RunConfig, dataset: PreparedDataset, packaged: RunConfig
) -> None:
    """From the run's own files; figures where it was evaluated.

    Args:
        packaged: the configuration that stands beside the card.
    """
    served = served_stage(config, dataset)
    stages = finished_stages(config, dataset)
    metrics = _test_metrics(config.run_dir / "evaluate")
    parts = [
        _front_matter(config, metrics),
        f"# {_title(config)}\n",
        _model(packaged, served),
        _data(config, dataset.manifest),
        _training(config, stages),
        _test(metrics),
        _use(config, dataset),
    ]
    with whole_file(path) as partial:
        partial.write_text("\n".join(part for part in parts if part), encoding="utf-8")


Metrics = Mapping[str, Mapping[str, Mapping[str, Estimate]]]  # task -> model -> metric


def _test_metrics(folder: Path) -> Metrics:
    """Of each task that was evaluated, from what `evaluate` left of each user or pair."""
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for task, shown in SHOWN.items():
        if (folder / f"{task}.parquet").is_file():
            table = pl.read_parquet(folder / f"{task}.parquet", glob=False)
            of_models = _of_users(table) if task == "ranking" else _of_pairs(table, task)
            found[task] = {
                model: {
                    name: one
                    for name, one in each.items()
                    if name.startswith(shown) and math.isfinite(one.value)  # GAUC of lone clicks
                }
                for model, each in of_models.items()
            }
    return found


def _of_users(table: pl.DataFrame) -> dict[str, dict[str, Estimate]]:
    found: dict[str, dict[str, Estimate]] = {}
    for column in table.columns[1:]:
        model, _, metric = column.rpartition(" ")
        found.setdefault(model, {})[metric] = mean_estimate(_tensor(table[column]))
    return found


def _of_pairs(table: pl.DataFrame, task: str) -> dict[str, dict[str, Estimate]]:
    metrics = click_metrics if task == "ctr" else rating_metrics
    users = _tensor(table["user"].rank("dense").cast(pl.Int64) - 1)
    labels = _tensor(table["label"])
    return {
        model: metrics(_tensor(table[model]), labels, users)
        for model in table.drop("user", "item", "label").columns
    }


def _tensor(column: pl.Series) -> torch.Tensor:
    return torch.from_numpy(column.to_numpy(writable=True))


# --- parts --------------------------------------------------------------------------------------


def _title(config: RunConfig) -> str:
    return f"{config.model.backbone} for {config.data.path.name}"


def _front_matter(config: RunConfig, metrics: Metrics) -> str:
    """YAML, whose flow style JSON is."""
    data = config.data.path.name
    results = [
        {
            "task": {"type": task, "name": task},
            "dataset": {"type": data, "name": data, "split": "test"},
            "metrics": [
                {"type": name, "value": round(one.value, 6)}
                for name, one in models.get("fine-tuned", models.get("pretrained", {})).items()
            ],
        }
        for task, models in metrics.items()
    ]
    head = {
        "library_name": "torchrec_pt",
        "tags": ["recommendation", "torchrec", config.model.backbone, *config.finetune.tasks],
        "datasets": [data],
        "model-index": [{"name": _title(config), "results": results}],
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    return "\n".join(["---", *lines, "---", ""])


def _model(config: RunConfig, served: StageResult) -> str:
    model = config.model
    tasks = ", ".join(config.finetune.tasks) or "nothing"
    kind = "fine-tuned for ranking" if is_of_ranking(served) else "pretrained"
    return (
        f"A {model.backbone} of {model.dim} dimensions, pretrained by self-supervision and "
        f"fine-tuned for {tasks}. The one {kind} recommends.\n\n"
        f"Configuration: `config.json`, digest `{config.digest()}`; seed {config.seed}.\n"
    )


def _data(config: RunConfig, manifest: Manifest) -> str:
    features = [f"{s.feature.of} {s.feature.column} ({s.feature.kind})" for s in manifest.features]
    return (
        f"## Trained on\n\n{config.data.path.name}: {manifest.num_users:,} users, "
        f"{manifest.num_items:,} items, {manifest.num_interactions:,} interactions, of which "
        f"{manifest.num_train:,} train, {manifest.num_valid:,} validate and {manifest.num_test:,} "
        f"test (split: {manifest.split.rule}). Features: {', '.join(features) or 'none'}. "
        f"Digest of the prepared data: `{manifest.fingerprint[:16]}`.\n"
    )


def _training(config: RunConfig, stages: Mapping[str, StageResult]) -> str:
    rows = [
        f"| {name} | {stage.values['monitor']} | {stage.metrics[stage.values['monitor']]:.4f} "
        f"| {stage.values['seconds'] / 60:.1f} |"
        for name, stage in stages.items()
    ]
    objectives = ""
    if config.pretrain is not None:
        names = ", ".join(str(objective.name) for objective in config.pretrain.objectives)
        objectives = f"Pretraining objectives: {names}.\n\n"
    head = "| stage | chosen by, on the validation split | best | minutes |\n|---|---|---|---|\n"
    return f"## Training\n\n{objectives}{head}" + "\n".join(rows) + "\n"


def _test(metrics: Metrics) -> str:
    if not metrics:
        return "## Test\n\nThe run was not evaluated.\n"
    parts = ["## Test\n\nOn the test split, ± the half-width of the 95 % interval over users.\n"]
    for task, models in metrics.items():
        names = [
            name for name in next(iter(models.values())) if all(name in m for m in models.values())
        ]
        head = f"| {task} | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n"
        rows = [
            f"| {model} | "
            + " | ".join(f"{each[name].value:.4f} ± {each[name].half_width:.4f}" for name in names)
            + " |"
            for model, each in models.items()
        ]
        parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _use(config: RunConfig, dataset: PreparedDataset) -> str:
    reads_content = any(summary.feature.of == "item" for summary in dataset.manifest.features)
    cold = "- An item that is not in the catalogue cannot be recommended.\n"
    if reads_content and config.model.item_content:
        cold += "  `embed_items(features=…)` makes a vector of its features.\n"
    return USE.format(
        user=json.dumps(dataset.users["external_id"][0]),
        item=json.dumps(dataset.items["external_id"][0]),
        split=dataset.manifest.split.rule,
        cold=cold,
    )
