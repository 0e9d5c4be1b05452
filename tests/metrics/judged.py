"""Interactions with predictions of two models."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUM_USERS = 300


def judged(seed: int = 0, digits: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two models' predictions in (0, 1), labels, and users with one to nine rows each, (P,) each.

    With two digits there are many ties, and some users have rows of one class.
    """
    draw = np.random.default_rng(seed)
    users = np.repeat(np.arange(NUM_USERS), draw.integers(1, 10, NUM_USERS))
    hard = draw.normal(0, 1, NUM_USERS)[users]
    own = draw.normal(0, 1, len(users))
    labels = hard + own + draw.normal(0, 1, len(users)) > 0.5
    a, b = (
        np.round(1 / (1 + np.exp(-((hard + own) * gain + noise))), digits).clip(0.001, 0.999)
        for gain, noise in zip((1.2, 0.7), draw.normal(0, 0.7, (2, len(users))), strict=True)
    )
    return tuple(torch.from_numpy(x) for x in (a, b, labels.astype(float), users))
