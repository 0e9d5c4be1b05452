"""Models from a configuration: new for training, or filled from a checkpoint for use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel

from torchrec_pt import checkpoint
from torchrec_pt.config import ModelConfig, PretrainConfig, RunConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import Ranks
from torchrec_pt.learner import Learner
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.objectives.contrastive import ContrastiveObjective
from torchrec_pt.objectives.masked_item import MaskedItemObjective
from torchrec_pt.objectives.next_item import NextItemObjective
from torchrec_pt.sharding import Placement, fill_item_table, settle_placement, shard


@dataclass(frozen=True)
class Built:
    """A learner and its sharded form."""

    learner: Learner
    model: DistributedModelParallel
    placement: Placement


def build_objectives(
    pretrain: PretrainConfig, model: ModelConfig, dataset: PreparedDataset
) -> list[nn.Module]:
    """The configured objectives.

    Raises:
        ValueError: an objective that the backbone cannot serve.
    """
    objectives: list[nn.Module] = []
    for config in pretrain.objectives:
        if config.name == "masked_item":
            objectives.append(MaskedItemObjective(config, model))
        elif config.name == "next_item":
            objectives.append(NextItemObjective(config, model))
        else:
            objectives.append(ContrastiveObjective(config, model, dataset.item_counts))
    return objectives


def build_learner(
    config: RunConfig,
    train: TrainConfig,
    objectives: Sequence[nn.Module],
    num_items: int,
    ranks: Ranks,
) -> Built:
    """A learner with initial values from the run's seed, placed on the ranks."""
    built = _build_unfilled(config, train, objectives, num_items, ranks)
    fill_item_table(built.model, config.seed)
    return built


def _build_unfilled(
    config: RunConfig,
    train: TrainConfig,
    objectives: Sequence[nn.Module],
    num_items: int,
    ranks: Ranks,
) -> Built:
    """The same, but for the item table, which holds nothing yet."""
    table = config.model.item_table
    placement = settle_placement(table, num_items, config.model.dim)
    torch.manual_seed(config.seed)
    backbone = Transformer(config.model, num_items)
    learner = Learner(backbone, objectives, placement, ranks)
    model = shard(learner, placement, table, train, ranks)
    return Built(learner, model, placement)


def load_backbone(config: RunConfig, path: Path, num_items: int, ranks: Ranks) -> Transformer:
    """The backbone of a checkpoint, for evaluation, export and serving; all ranks call it."""
    built = _build_unfilled(config, TrainConfig(), [], num_items, ranks)
    checkpoint.load(path, {f"model.{n}": v for n, v in built.model.state_dict().items()})
    built.model.eval()
    return built.learner.backbone
