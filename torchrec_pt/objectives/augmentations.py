"""Two views of a history differ by how each is augmented.

crop, mask, reorder (Xie et al. 2022, CL4SRec, section 3.2); substitute, insert (Liu et al. 2021,
CoSeRec, section 3.3), whose items are the most correlated ones of `item_correlation`; dropout
leaves the history as it is to the dropout of the model (Qiu et al. 2022, DuoRec).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.config import Contrastive
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.objectives.lots import draw_name, draw_place
from torchrec_pt.objectives.windows import permute_stretches
from torchrec_pt.rng import RowNoise


class Augmentations:
    """Each history by one of the configured ones, drawn at random.

    Args:
        max_length: no history is longer, before and after.
        most_correlated: (num_items,) int64, for substitute and insert.
    """

    def __init__(
        self, config: Contrastive, max_length: int, most_correlated: Tensor | None = None
    ) -> None:
        assert most_correlated is not None or not config.needs_correlation
        self.config = config
        self.max_length = max_length
        self.most_correlated = most_correlated

    def __call__(self, history: Jagged, noise: RowNoise) -> tuple[Jagged, Tensor]:
        """(jagged ids, (T,) bool: hidden)."""
        lots = noise.per_row("contrastive.augment", 3)
        names = self.config.augmentations
        chosen = draw_name(lots[:, 0], names)
        history = self._crop(history, chosen("crop"), lots[:, 1])
        if "substitute" in names:
            history = self._substitute(history, chosen("substitute"), noise)
        if "insert" in names:
            history = self._insert(history, chosen("insert"), noise)
        row, position = history.rows, history.positions
        is_masked = noise.per_token("contrastive.mask", row, position) < self.config.mask_fraction
        is_masked &= chosen("mask")[row]
        return self._reorder(history, chosen("reorder"), lots[:, 2], noise), is_masked

    def _crop(self, history: Jagged, chosen: Tensor, lot: Tensor) -> Jagged:
        lengths = history.lengths
        kept = (lengths * self.config.crop_fraction).long().clamp(min=1).minimum(lengths)
        start = draw_place(lot, lengths - kept)
        return history.windows(torch.where(chosen, start, 0), torch.where(chosen, kept, lengths))

    def _substitute(self, history: Jagged, chosen: Tensor, noise: RowNoise) -> Jagged:
        fraction = self.config.substitute_fraction
        is_drawn = _draw_places(history, chosen, fraction, noise, "contrastive.substitute")
        assert self.most_correlated is not None
        items = history.values
        return history.with_values(torch.where(is_drawn, self.most_correlated[items], items))

    def _insert(self, history: Jagged, chosen: Tensor, noise: RowNoise) -> Jagged:
        """Correlated items before those they go with; of what becomes too long the end is kept."""
        fraction = self.config.insert_fraction
        is_drawn = _draw_places(history, chosen, fraction, noise, "contrastive.insert")
        num = 1 + is_drawn.long()
        source = torch.arange(len(num)).repeat_interleave(num)
        is_new = torch.zeros_like(source, dtype=torch.bool)
        is_new[:-1] = source.diff() == 0
        assert self.most_correlated is not None
        items = history.values[source]
        items = torch.where(is_new, self.most_correlated[items], items)
        return Jagged(items, F.pad(num.cumsum(0), (1, 0))[history.offsets]).tail(self.max_length)

    def _reorder(self, history: Jagged, chosen: Tensor, lot: Tensor, noise: RowNoise) -> Jagged:
        lengths = history.lengths
        length = (lengths * self.config.reorder_fraction).long()
        begin = draw_place(lot, lengths - length)
        lots = noise.per_token("contrastive.reorder", history.rows, history.positions)
        return permute_stretches(history, begin, torch.where(chosen, length, 0), lots)


def _draw_places(
    history: Jagged, chosen: Tensor, fraction: float, noise: RowNoise, site: str
) -> Tensor:
    """(T,) bool: of each chosen row (R,) this part of its places, rounded down, one at least."""
    row, position = history.rows, history.positions
    lot = noise.per_token(site, row, position).double()
    by_lot = torch.argsort(row + lot, stable=True)
    rank = torch.empty_like(position)
    rank[by_lot] = position
    num = (history.lengths * fraction).long().clamp(min=1)
    return rank < torch.where(chosen, num, 0)[row]
