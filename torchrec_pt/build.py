"""From a configuration and a dataset to modules: a task, a backbone, a learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel

from torchrec_pt.checkpoint import Checkpoint
from torchrec_pt.config import ModelConfig, RunConfig, TrainConfig, transfer_of
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import load_entity_features, no_features
from torchrec_pt.distributed import Ranks
from torchrec_pt.learner import Learner
from torchrec_pt.models.autoencoder import Autoencoder
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.item_content import ItemContent, RowHiding
from torchrec_pt.models.precision import multiply_in_bf16
from torchrec_pt.models.transformer import Transformer
from torchrec_pt.models.two_tower import TwoTower
from torchrec_pt.placement import Placement, settle_placement
from torchrec_pt.sharding import fill_item_table, shard
from torchrec_pt.tasks.ctr import CtrTask
from torchrec_pt.tasks.pairs import PairTask
from torchrec_pt.tasks.ranking import RankingTask, build_ranking
from torchrec_pt.tasks.rating import RatingTask


@dataclass(frozen=True)
class Built:
    """A learner and its sharded form."""

    learner: Learner
    model: DistributedModelParallel
    placement: Placement


def build_task(config: RunConfig, name: str, dataset: PreparedDataset) -> RankingTask | PairTask:
    """A configured task, its head with initial values from the run's seed.

    Raises:
        ValueError: data that the task cannot use.
    """
    torch.manual_seed(config.seed)
    finetune = config.finetune
    if name == "ctr":
        assert finetune.ctr is not None
        return CtrTask(finetune.ctr, config.model, dataset, seed=config.seed)
    if name == "rating":
        assert finetune.rating is not None
        return RatingTask(finetune.rating, config.model, dataset, seed=config.seed)
    assert finetune.ranking is not None
    return build_ranking(finetune.ranking, config.model, dataset, seed=config.seed)


def build_backbone(model: ModelConfig, dataset: PreparedDataset) -> Backbone:
    """The configured backbone, initial values from torch's generator; the item table is empty.

    Raises:
        ValueError: row_dropout, and nothing but their rows is known of the items; or positions by
            time, and the data has none.
    """
    features = no_features("item", dataset.num_items)
    if model.item_content:
        features = load_entity_features(dataset, "item")
    if model.row_dropout and not features.num_fields:
        raise ValueError(
            "model.row_dropout: leaves items to their features, and none is used; declare item "
            "features in data.features, set item_content to true, or drop row_dropout"
        )
    hiding = None
    if features.num_fields:
        hiding = RowHiding(model.row_dropout, num_trained=dataset.num_trained_items)
    if model.backbone == "two_tower":
        users = load_entity_features(dataset, "user")
        return TwoTower(model, dataset.num_items, users, features, hiding)
    content = None if hiding is None else ItemContent(features, model.row_dim, hiding)
    if model.backbone == "autoencoder":
        return Autoencoder(model, dataset.num_items, content)
    if model.positions == "relative_time" and dataset.timestamp is None:
        raise ValueError(
            'model.positions: "relative_time" needs times, data.columns.timestamp is not set; '
            'set it, or use "rotary"'
        )
    return Transformer(model, dataset.num_items, content)


def build_learner(
    config: RunConfig,
    train: TrainConfig,
    objectives: Sequence[nn.Module],
    dataset: PreparedDataset,
    ranks: Ranks,
) -> Built:
    """A learner with initial values from the run's seed, placed on the ranks."""
    built = _build_unfilled(config, train, objectives, dataset, ranks)
    fill_item_table(built.model, config.seed)
    if train.precision == "bf16":
        multiply_in_bf16(built.learner)
    return built


def _build_unfilled(
    config: RunConfig,
    train: TrainConfig,
    objectives: Sequence[nn.Module],
    dataset: PreparedDataset,
    ranks: Ranks,
) -> Built:
    """The same, but for the item table, which holds nothing yet."""
    table = config.model.item_table
    placement = settle_placement(table, dataset.num_items, config.model.row_dim, ranks.device.type)
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.model, dataset)
    learner = Learner(backbone, objectives, placement, ranks)
    frozen = transfer_of(train).frozen
    if frozen is not None:
        learner.freeze(frozen)
    model = shard(learner, placement, train, ranks)
    return Built(learner, model, placement)


def load_learner(
    config: RunConfig,
    path: Path,
    dataset: PreparedDataset,
    ranks: Ranks,
    objectives: Sequence[nn.Module] = (),
) -> Learner:
    """The backbone of a checkpoint, and the task that was trained with it where one is given.

    For evaluation, export and serving; all ranks call it.

    Raises:
        CheckpointError: a damaged checkpoint, or one of another model or catalogue.
    """
    checkpoint = Checkpoint.open(path, ranks)
    built = _build_unfilled(config, TrainConfig(), objectives, dataset, ranks)
    tensors = {f"model.{name}": value for name, value in built.model.state_dict().items()}
    checkpoint.load(tensors, dataset.items["external_id"])
    built.model.eval()
    return built.learner
