"""Next segment prediction: does B follow A? (BERT's NSP, Devlin et al. 2019, section 3.1.)

A history is cut in two, and the parts are encoded apart and compared by a bilinear form, as
S3-Rec's segments (Zhou et al. 2020, section 4.4): what learns is the vector that ranks items.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt import rng
from torchrec_pt.config import ModelConfig, NextSegment
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import gather_rows
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.objectives.lots import draw_place
from torchrec_pt.objectives.windows import draw_windows

_LAST = torch.iinfo(torch.int64).max  # the number of a row that is no pair


class NextSegmentObjective(nn.Module):
    """Each row's own B and the B of another row of the global batch, by binary cross entropy.

    A row's loss is the mean of the two; where no other row has a B, that of its own. The logit is
    LN(b) · W LN(a) / √D + c.
    """

    needs_catalogue = False

    def __init__(self, config: NextSegment, model: ModelConfig) -> None:
        super().__init__()
        self.name = config.name
        self.scale = config.weight
        self.max_length = model.history_length
        # W starts as the identity: with a random one, or an MLP, the histories' vectors became
        # one (the loss stayed at log 2) before what tells them apart was found.
        self.bilinear = nn.Parameter(torch.eye(model.dim))
        self.bias = nn.Parameter(torch.zeros(()))

    def draw(self, rows: Rows) -> Draw:
        """Both parts have 1 … max_length items; a history of fewer than two has no parts."""
        window = draw_windows(rows, 2 * self.max_length, "next_segment.window")
        length = window.lengths
        is_pair = length > 1
        shortest = (length - self.max_length).clamp(min=1)
        longest = (length - 1).clamp(max=self.max_length)
        lot = rows.noise.per_row("next_segment.cut", 1).squeeze(1)
        cut = torch.where(is_pair, shortest + draw_place(lot, longest - shortest), 0)
        before = window.windows(0 * cut, cut)
        after = window.windows(cut, torch.where(is_pair, length - cut, 0))
        return Draw(
            lookups={"segments": Jagged.stack([before, after])}, tensors={"is_pair": is_pair}
        )

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm:
        weight = keys.weight * drawn.tensors["is_pair"]
        # Nobody is known to have taken B: features of its user would give the answer away.
        users = torch.cat([keys.users, torch.full_like(keys.users, -1)])
        encoded = backbone.encode_users(users, drawn.vectors["segments"], keys.noise.copies(2))
        before, after = encoded.chunk(2)
        other, has_other = self._other_rows(after, weight, keys)
        follows = F.softplus(-self._logits(before, after))
        is_other = F.softplus(self._logits(before, other))
        loss = torch.where(has_other, (follows + is_other) / 2, follows)
        return LossTerm((weight * loss).sum(), weight.sum())

    def _logits(self, before: Tensor, after: Tensor) -> Tensor:
        shape = before.shape[1:]
        expected = F.layer_norm(before, shape) @ self.bilinear.T
        return (expected * F.layer_norm(after, shape)).sum(1) / shape[0] ** 0.5 + self.bias

    def _other_rows(self, after: Tensor, weight: Tensor, keys: RowKeys) -> tuple[Tensor, Tensor]:
        """(B, D) for each row the B of another one, and 0-dim whether there are others."""
        counts = [len(after)] * dist.get_world_size()  # every rank holds equally many
        numbers = gather_rows(torch.where(weight > 0, keys.noise.rows, _LAST), counts)
        noise = keys.noise
        chosen, has_other = other_rows(numbers, rng.key(noise.seed, noise.step, "next_segment"))
        mine = chosen.split(counts)[dist.get_rank()]
        # Indexing would add up its gradient in the order in which threads come.
        return F.embedding(mine, gather_rows(after, counts)), has_other


def other_rows(numbers: Tensor, lot: int) -> tuple[Tensor, Tensor]:
    """The rows in a circle by their numbers, each with the one a drawn number of places on.

    Args:
        numbers: (N,) int64 of the rows in the global batch, in any order; _LAST for no row.
    Returns:
        (N,) int64 places in `numbers`, no row with itself and no two with the same; 0-dim bool,
        whether there are two rows at all.
    """
    order = numbers.argsort(stable=True)
    num = (numbers < _LAST).sum()
    shift = 1 + lot % (num - 1).clamp(min=1)
    return order[(order.argsort() + shift) % num.clamp(min=1)], num > 1
