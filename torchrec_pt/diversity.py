"""Lists of items that are good and unlike each other: maximal marginal relevance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def choose_diverse(scores: Tensor, vectors: Tensor, k: int, diversity: float) -> Tensor:
    """Places of k candidates, chosen one after the other (Carbonell & Goldstein 1998).

    The next one has the largest (1 − λ) · relevance − λ · max cosine with those chosen before.
    Relevance is the score's place between the lowest and the highest of the row, 0 to 1, so that
    λ means the same whatever a model's scores are. Equal ones go by place.

    Args:
        scores: (B, P) float32, best first; −inf for what is no candidate.
        vectors: (B, P, D) of the candidates.
        diversity: λ, 0 for the plain list, 1 for unlike items alone.
    Returns:
        (B, min(k, P)) int64, −1 where candidates ran out.
    """
    is_left = scores > -torch.inf
    lowest = scores.masked_fill(~is_left, torch.inf).amin(1, keepdim=True)
    spread = (scores[:, :1] - lowest).clamp(min=torch.finfo(torch.float32).tiny)
    relevance = ((scores - lowest) / spread).masked_fill(~is_left, 0.0)
    unit = F.normalize(vectors, dim=2)
    rows = torch.arange(len(scores), device=scores.device)
    closest = torch.zeros_like(relevance)
    chosen = []
    for num in range(min(k, scores.shape[1])):
        value = (1 - diversity) * relevance - diversity * closest
        best = value.masked_fill(~is_left, -torch.inf).argmax(1)
        chosen.append(torch.where(is_left.any(1), best, -1))
        is_left[rows, best] = False
        cosine = torch.einsum("bpd,bd->bp", unit, unit[rows, best])
        closest = cosine if num == 0 else torch.maximum(closest, cosine)
    return torch.stack(chosen, dim=1)
