"""Epochs of a stage's training in turns: its own pieces, without validations and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from turn_costs import costs_of

from torchrec_pt.build import build_learner
from torchrec_pt.config import RunConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.loader import HistoryLoader
from torchrec_pt.distributed import Ranks
from torchrec_pt.optim import Optimizers
from torchrec_pt.train import Trainer
from torchrec_pt.transfer import Numbering


class Epochs:
    """The training of objectives, or of a task, as `train` has it."""

    def __init__(
        self,
        config: RunConfig,
        train: TrainConfig,
        objectives: Sequence[nn.Module],
        dataset: PreparedDataset,
        ranks: Ranks,
        *,
        name: str,
        with_impressions: bool = False,
    ) -> None:
        built = build_learner(config, train, objectives, dataset, ranks)
        self.loader = HistoryLoader(
            dataset,
            batch_size=train.batch_size,
            max_length=config.model.max_length,
            seed=config.seed,
            ranks=ranks,
            with_impressions=with_impressions,
        )
        num_steps = train.epochs * self.loader.steps_per_epoch
        self.trainer = Trainer(
            built.model,
            built.learner,
            Optimizers(built.model, train, built.placement, num_steps),
            self.loader,
            train,
            name=name,
            monitor="",
            folder=config.run_dir / name,
            fingerprint="",
            numbering=Numbering.of(dataset),
            ranks=ranks,
            console=None,
        )
        built.model.train()
        self.num_parameters = sum(p.numel() for p in built.model.parameters())
        self._epoch = 0

    def turn(self, epochs: int, num_an_epoch: int) -> dict[str, Any]:
        """What `epochs` cost, and how much they go through."""
        return {"num": epochs * num_an_epoch, **costs_of(lambda: self._train(epochs))}

    def _train(self, epochs: int) -> None:
        for _ in range(epochs):
            for rows in self.loader.steps(self._epoch):
                self.trainer.step(rows)
                self.trainer.position.step += 1
            self._epoch += 1
