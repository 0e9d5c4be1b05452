"""Which items of a user's training are relevant to ranking, and which were shown and are not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchrec_pt.config import RankingConfig
from torchrec_pt.data.batch import rows_of_users
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.splits import TRAIN
from torchrec_pt.distributed import raised_together, sum_over_ranks
from torchrec_pt.tasks.labels import labelled


@dataclass(frozen=True, eq=False)
class Relevance:
    """Of each of this rank's U users.

    Attributes:
        places: U rows, ascending: where in the user's training history, from 1 on, the relevant
            items stand. None: everywhere.
        gains: (T,) float32 of the items at these places; None: 1.
        shown: U rows of items that were shown and are not relevant, in time order; None: no such.
        num_before: (S,) int64, items of the user's training history before each of these.
    """

    places: Jagged | None = None
    gains: Tensor | None = None
    shown: Jagged | None = None
    num_before: Tensor | None = None

    def relevant(self, users: Tensor, histories: Jagged) -> tuple[Jagged, Tensor]:
        """R rows of the relevant places in histories of users (R,), and the gain of each (T,)."""
        if self.places is None:
            everywhere = histories.with_values(histories.positions)
            places = Jagged(everywhere.values, everywhere.offsets).filter(everywhere.values > 0)
            return places, torch.ones(len(places.values))
        places = rows_of_users(self.places, users)
        if self.gains is None:
            return places, torch.ones(len(places.values))
        return places, rows_of_users(self.places.with_values(self.gains), users).values

    def shown_after(self, users: Tensor, cut: Tensor, most: int) -> Jagged:
        """R rows: the first `most` items shown to users (R,) after the first `cut` (R,) taken."""
        if self.shown is None:
            return Jagged.from_lengths(users[:0], torch.zeros_like(users))
        stride, keys = self._shown_keys
        known = users.clamp(min=0)
        start = torch.searchsorted(keys, known * stride + cut.clamp(max=stride))
        length = (self.shown.offsets[known + 1] - start).clamp(max=most)
        return self.shown.slices(start, torch.where(users < 0, 0, length))

    @cached_property
    def _shown_keys(self) -> tuple[int, Tensor]:
        """A stride, and user · stride + num_before of all that was shown: ascending."""
        assert self.shown is not None
        assert self.num_before is not None
        stride = int(self.num_before.max()) + 1 if len(self.num_before) else 1
        return stride, self.shown.rows * stride + self.num_before


def load_relevance(config: RankingConfig, dataset: PreparedDataset, seed: int) -> Relevance:
    """What the data say of relevance, as configured; all ranks call it.

    `label_fraction` leaves a share of the items relevant; the others stay in histories.

    An item that a user was shown and takes at another time counts as taken alone.

    Raises:
        ValueError: ratings or impressions are asked for, and the data have none that serve.
    """
    is_rated = config.positive_rating is not None or config.gain == "rating"
    if is_rated and dataset.rating is None:
        key = "gain" if config.positive_rating is None else "positive_rating"
        raise ValueError(
            f"finetune.ranking.{key}: needs ratings, data.columns.rating is not set; set it"
        )
    if config.impressions and dataset.label is None and config.positive_rating is None:
        raise ValueError(
            "finetune.ranking.impressions: needs items that were shown and not taken, "
            "data.columns.label is not set; set it, or positive_rating, or leave impressions out"
        )
    is_train = dataset.split == TRAIN
    in_history = is_train & dataset.is_taken
    is_relevant = in_history
    if config.positive_rating is not None:
        assert dataset.rating is not None
        is_relevant = in_history & (dataset.rating >= config.positive_rating)
    is_asked = is_relevant
    if config.label_fraction < 1:
        is_asked = is_relevant & labelled(dataset, config.label_fraction, seed)
    rows = torch.arange(len(is_train))
    history = Jagged(rows, dataset.interactions.offsets).filter(in_history)
    places, gains = None, None
    if is_rated or config.label_fraction < 1:
        is_place = is_asked[history.values] & (history.positions > 0)
        places = history.with_values(history.positions).filter(is_place)
        _require_targets(config, places)
    if config.gain == "rating":
        assert dataset.rating is not None
        gains = dataset.rating[history.values[is_place]]
        _require_gains(gains)
    impressions = dataset.label is not None if config.impressions is None else config.impressions
    if not impressions or config.list_negatives is None:
        return Relevance(places, gains)

    of_user = dataset.interactions.rows * dataset.num_items + dataset.interactions.values
    is_shown = is_train & ~is_relevant & ~torch.isin(of_user, of_user[is_relevant])
    counted = torch.cat([rows.new_zeros(1), in_history.cumsum(0)])
    offsets = dataset.interactions.offsets
    num_before = counted[:-1] - counted[offsets[dataset.interactions.rows]]
    items = Jagged(dataset.interactions.values, offsets)
    return Relevance(places, gains, items.filter(is_shown), num_before[is_shown])


def _require_targets(config: RankingConfig, places: Jagged) -> None:
    if int(sum_over_ranks(torch.tensor(len(places.values)))):
        return
    if config.positive_rating is None:
        raise ValueError(
            f"finetune.ranking.label_fraction: {config.label_fraction:g} of the labels leaves no "
            "item to learn from; raise it"
        )
    raise ValueError(
        f"finetune.ranking.positive_rating: no user has a training item rated "
        f"{config.positive_rating} or more after another one; lower it"
    )


def _require_gains(gains: Tensor) -> None:
    with raised_together():
        if len(gains) and float(gains.min()) <= 0:
            raise ValueError(
                f"finetune.ranking.gain: a relevant item's rating must be above 0, found "
                f"{float(gains.min()):g}; set positive_rating above 0"
            )
