"""Losses of lists: which of a user's items stand before which others.

A list is a row of L items with their scores. Its first K may be relevant, as their gains say; the
others are negatives of gain 0. Every loss takes

    scores (R, L) float, larger is better
    gains  (R, K) float, K ≤ L, 0 or more; 0 is not relevant
    mask   (R, L) bool, false where a list has no item, whatever score and gain stand there

and gives (R,) losses, 0 for a list without a relevant item. Nothing of size L × L is held, but
K × L a list.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bpr_loss(scores: Tensor, gains: Tensor, mask: Tensor) -> Tensor:
    """−log σ(s_i − s_j), the mean over the pairs of g_i > g_j (Rendle et al. 2009, section 4.1)."""
    pairs = _pairs(gains, mask)
    return _mean(F.softplus(-_margins(scores, gains)), pairs)


def hinge_loss(scores: Tensor, gains: Tensor, mask: Tensor, margin: float = 1.0) -> Tensor:
    """max(0, margin − (s_i − s_j)), the mean over the pairs of g_i > g_j (Joachims 2002)."""
    pairs = _pairs(gains, mask)
    return _mean(F.relu(margin - _margins(scores, gains)), pairs)


def softmax_loss(scores: Tensor, gains: Tensor, mask: Tensor, log_q: Tensor) -> Tensor:
    """Σ_i g_i / Σg · (log(e^{s_i} + Σ_j e^{s_j − log_q_j}) − s_i), j over the list's negatives.

    Each relevant item is set against the negatives alone, corrected by how often each of them is
    expected (Bengio and Senécal 2008, section III).

    Args:
        log_q: (R, L − K), of the items after the first K.
    """
    gains = _masked(gains, mask)
    num_first = gains.shape[1]
    first, others = scores.split([num_first, scores.shape[1] - num_first], dim=1)
    others = (others - log_q).masked_fill(~mask[:, num_first:], -torch.inf)
    # Low enough to vanish beside any score, yet with a gradient where a list has no negative.
    negatives = others.clamp(min=torch.finfo(scores.dtype).min / 2).logsumexp(1, keepdim=True)
    each = F.softplus(negatives - first)
    return _mean(each, gains)


def listnet_loss(scores: Tensor, gains: Tensor, mask: Tensor) -> Tensor:
    """−Σ_i P_g(i) log P_s(i), P the softmax over the list (Cao et al. 2007, section 4.3).

    The best scores are the gains but for a constant: unlike in the other losses, a relevant item
    may be too far ahead.
    """
    gains = _masked(gains, mask)
    said = F.pad(gains, (0, scores.shape[1] - gains.shape[1])).masked_fill(~mask, -torch.inf)
    log_share = scores.masked_fill(~mask, -torch.inf).log_softmax(1).masked_fill(~mask, 0)
    # A list without an item has NaN for its softmax; it is taken out before the product.
    wanted = said.softmax(1).masked_fill(~_is_relevant(gains), 0)
    return -(wanted * log_share.masked_fill(~_is_relevant(gains), 0)).sum(1)


def lambda_loss(scores: Tensor, gains: Tensor, mask: Tensor) -> Tensor:
    """Σ |ΔNDCG_ij| log(1 + e^{s_j − s_i}) over the pairs of g_i > g_j, ΔNDCG of changing places.

    LambdaRank (Burges 2010, section 4), as the loss of which its λ are the gradients (Wang et al.
    2018, section 4.2): |ΔNDCG_ij| = (g_i − g_j) |1 / D(r_i) − 1 / D(r_j)| / maxDCG with
    D(r) = log2(1 + r) and r the ranks by the present scores, equal ones in the order of the list.
    """
    gains = _masked(gains, mask)
    num_first = gains.shape[1]
    known = scores.detach().masked_fill(~mask, -torch.inf)
    order = known.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand_as(order)
    discount = 1 / torch.log2(1 + torch.zeros_like(order).scatter(1, order, places).to(scores))
    all_gains = F.pad(gains, (0, scores.shape[1] - num_first))
    worth = gains.unsqueeze(2) - all_gains.unsqueeze(1)
    moved = (discount[:, :num_first].unsqueeze(2) - discount.unsqueeze(1)).abs()
    weight = worth * moved * _pairs(gains, mask) / _max_dcg(gains)[:, None, None]
    return (weight * F.softplus(-_margins(scores, gains))).sum((1, 2))


def approx_ndcg_loss(scores: Tensor, gains: Tensor, mask: Tensor) -> Tensor:
    """1 − Σ_i g_i / log2(1 + r_i) / maxDCG with r_i = 1 + Σ_{j ≠ i} σ(s_j − s_i).

    Qin et al. 2010, section 4.1; their α is the inverse of the temperature that scores come
    divided by.
    """
    gains = _masked(gains, mask)
    ahead = torch.sigmoid(-_margins(scores, gains)) * mask.unsqueeze(1)
    rank = ahead.sum(2) + 0.5  # of itself, σ(0) = 0.5
    dcg = (gains / torch.log2(1 + rank)).sum(1)
    return torch.where(_is_relevant(gains).squeeze(1), 1 - dcg / _max_dcg(gains), 0.0)


# --- parts --------------------------------------------------------------------------------------


def _masked(gains: Tensor, mask: Tensor) -> Tensor:
    return gains.masked_fill(~mask[:, : gains.shape[1]], 0)


def _is_relevant(gains: Tensor) -> Tensor:
    """(R, 1) bool: whether a list has a relevant item."""
    return (gains > 0).any(1, keepdim=True)


def _margins(scores: Tensor, gains: Tensor) -> Tensor:
    """(R, K, L) s_i − s_j"""
    return scores[:, : gains.shape[1]].unsqueeze(2) - scores.unsqueeze(1)


def _pairs(gains: Tensor, mask: Tensor) -> Tensor:
    """(R, K, L) 1 where the list has both items and g_i > g_j, else 0."""
    gains = _masked(gains, mask)
    others = F.pad(gains, (0, mask.shape[1] - gains.shape[1]))
    is_pair = (gains.unsqueeze(2) > others.unsqueeze(1)) & mask.unsqueeze(1)
    return is_pair.to(gains)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """(R,) weighted mean over all dimensions but the first; 0 where nothing has weight."""
    over = tuple(range(1, values.dim()))
    total = weight.sum(over).clamp(min=torch.finfo(values.dtype).tiny)
    return (values * weight).sum(over) / total


def _max_dcg(gains: Tensor) -> Tensor:
    """(R,) DCG of the best order; 1 for a list without a relevant item."""
    best = gains.sort(1, descending=True).values
    places = torch.arange(1, gains.shape[1] + 1, device=gains.device).to(gains)
    total = (best / torch.log2(1 + places)).sum(1)
    return torch.where(total > 0, total, 1.0)
