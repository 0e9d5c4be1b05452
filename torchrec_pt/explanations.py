"""Why an item is offered: the items of the user's history that are most like it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Reason:
    """An item of the user's history.

    Attributes:
        share: its part in the likeness of the whole history to the offered item, 0 to 1.
    """

    item: str | int
    share: float


def shares_of_history(offered: Tensor, history: Tensor) -> Tensor:
    """(K, H): each history item's share in what makes the history like an offered item.

    Likeness is the cosine, or 0 where that is negative; the shares of a row sum to 1, or are all
    0 where nothing of the history is like the item.

    Args:
        offered: (K, D) vectors of items.
        history: (H, D) vectors of the distinct items of a history.
    """
    cosine = (F.normalize(offered, dim=1) @ F.normalize(history, dim=1).T).clamp(min=0)
    return cosine / cosine.sum(1, keepdim=True).clamp(min=torch.finfo(cosine.dtype).tiny)
