"""From a configuration and a dataset to pretraining objectives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from torchrec_pt.config import ItemPrediction, Objective, RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.objectives.autoencoder import AutoencoderObjective
from torchrec_pt.objectives.contrastive import ContrastiveObjective
from torchrec_pt.objectives.denoising import DenoisingObjective
from torchrec_pt.objectives.item_bce import SampledBce
from torchrec_pt.objectives.item_correlation import most_correlated
from torchrec_pt.objectives.item_softmax import CatalogueSoftmax, ItemLoss, SampledSoftmax
from torchrec_pt.objectives.masked_item import MaskedItemObjective
from torchrec_pt.objectives.next_item import NextItemObjective
from torchrec_pt.objectives.next_segment import NextSegmentObjective


def build_objectives(config: RunConfig, dataset: PreparedDataset) -> list[nn.Module]:
    """The configured pretraining objectives; all ranks call it.

    Their parameters have values from the run's seed.

    Raises:
        ValueError: none configured, or one that the backbone cannot serve.
    """
    if config.pretrain is None:
        raise ValueError("pretrain: the configuration has no [pretrain] section; add one")
    torch.manual_seed(config.seed)
    return [_build_objective(one, config, dataset) for one in config.pretrain.objectives]


def _build_objective(
    objective: Objective, config: RunConfig, dataset: PreparedDataset
) -> nn.Module:
    model, counts = config.model, dataset.item_counts
    if objective.name == "contrastive":
        correlated = None
        if objective.needs_correlation:
            correlated = most_correlated(dataset.history("train"), counts)
        return ContrastiveObjective(
            objective, model, counts, seed=config.seed, most_correlated=correlated
        )
    if objective.name == "autoencoder":
        return AutoencoderObjective(objective, model, dataset)
    if objective.name == "masked_item":
        return MaskedItemObjective(objective, model, _build_item_loss(objective, config, dataset))
    if objective.name == "next_segment":
        return NextSegmentObjective(objective, model)
    if objective.name == "denoising":
        loss = _build_item_loss(objective, config, dataset)
        return DenoisingObjective(objective, model, dataset.num_trained_items, loss)
    return NextItemObjective(objective, model, _build_item_loss(objective, config, dataset))


def _build_item_loss(
    objective: ItemPrediction, config: RunConfig, dataset: PreparedDataset
) -> ItemLoss:
    if objective.negatives is None:
        return CatalogueSoftmax()
    build: Callable[..., ItemLoss] = SampledSoftmax
    if objective.loss != "softmax":
        calibration = objective.calibration if objective.loss == "gbce" else 0.0
        build = functools.partial(SampledBce, calibration=calibration)
    return build(
        objective.negatives,
        dataset.item_counts,
        seed=config.seed,
        name=objective.name,
        max_length=config.model.max_length,
    )
