"""A running average of the weights, which is judged and kept while the weights themselves train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class AveragedWeights:
    """Exponential average of the trained weights over the updates of a stage.

        average ← d · average + (1 − d) · weight        d = min(decay, (1 + t) / (10 + t))

    after update t, counted from 0. Averages of the iterates go back to Polyak and Juditsky 1992;
    this is the form of torch.optim.swa_utils.get_ema_multi_avg_fn. With a decay near 1 it would
    hold on to the initial weights for the first 1 / (1 − decay) updates. The second bound, of
    TensorFlow's ExponentialMovingAverage (`num_updates`), makes it forget them at once, reach
    back over about a ninth of the updates so far, and need no state but t.

    Args:
        weights: parameter name -> (…) float32, whole on every rank; the averages start from them.
        decay: in (0, 1).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._averages = {name: weight.clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, num_before: int) -> None:
        """Take in the weights as the update after `num_before` others left them."""
        decay = min(self.decay, (1 + num_before) / (10 + num_before))
        averages, weights = list(self._averages.values()), list(self._weights.values())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model holds the averages, and nothing may train."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            average = self._averages[name]
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)

    def tensors(self) -> dict[str, Tensor]:
        """As checkpoints name them: under "model." what is used, under "raw." what trains on."""
        averages = {f"model.{name}": average for name, average in self._averages.items()}
        return averages | {f"raw.{name}": weight for name, weight in self._weights.items()}
