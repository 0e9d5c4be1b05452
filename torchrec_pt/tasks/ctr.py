"""Click-through rate: the probability of a click."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.config import CtrConfig, ModelConfig, Negatives
from torchrec_pt.data.batch import RowKeys, rows_of_users
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.splits import SPLIT_CODES, TRAIN
from torchrec_pt.distributed import raised_together
from torchrec_pt.objectives.item_softmax import build_sampler
from torchrec_pt.tasks.asked import NO_INTERACTION, Asked
from torchrec_pt.tasks.pairs import PairTask, label_sums, mean_over_ranks

USERS_AT_A_TIME = 1024


class CtrTask(PairTask):
    """Labels are clicks (1) and impressions without one (0); predictions are probabilities.

    Of data that has clicks alone, each is set beside `negatives.num` drawn items that the user
    has not in training (held-out clicks: in no split), alike in training and evaluation; the
    probability is then that of telling the two apart.

    bce: logistic loss.
    weighted: clicks count `positive_weight` times (King and Zeng 2001, section 4.2). The logit is
        that of the data as it is, the loss sees it shifted by log positive_weight.
    focal: (1 − p)^γ · bce, p the probability of what happened (Lin et al. 2017). Its minimum is no
        probability; predictions are turned into one (Charoenphakdee et al. 2021, section 3).
    """

    name = "ctr"
    config: CtrConfig

    def __init__(
        self, config: CtrConfig, model: ModelConfig, dataset: PreparedDataset, *, seed: int
    ) -> None:
        labels = click_labels(config, dataset)
        self._negatives = negatives_of(config, dataset)
        self._seed = seed
        if self._negatives is not None:
            self._item_counts = dataset.item_counts
        super().__init__(config, model, dataset, labels, seed=seed)
        if self._negatives is not None:
            # What is known of a history is that it was clicked, which tells nothing more.
            self._told = torch.full_like(labels, torch.nan)

    def _mean_label(self, labels: Tensor) -> float:
        if self._negatives is None:
            return mean_over_ranks(labels)
        return 1 / (1 + self._negatives.num)

    def _deviations(self, labels: Tensor, items: Tensor) -> Tensor:
        """With sampled negatives: of the clicks, and of how often an item is expected beside."""
        if self._negatives is None:
            return super()._deviations(labels, items)
        clicks = label_sums(items, labels, self.dataset.num_items)[0]
        sampler = build_sampler(self._negatives, self._item_counts, seed=self._seed, name=self.name)
        share = sampler.log_q(torch.arange(self.dataset.num_items)).exp() / self._negatives.num
        count = clicks + self._negatives.num * clicks.sum() * share
        return torch.stack([clicks - self.mean * count, count])

    @property
    def information(self) -> float:
        """A label's variance, beside that of a fair coin: one of many impressions says little."""
        return 4 * self.mean * (1 - self.mean)

    def link(self, deviation: Tensor) -> Tensor:
        """The logit, where a deviation of the probability counts to first order around the mean."""
        base = math.log(self.mean / (1 - self.mean))
        return base + deviation / (self.mean * (1 - self.mean))

    def final(self, linked: Tensor) -> Tensor:
        if self.config.loss == "focal":
            return torch.sigmoid(
                focal_logit(linked, gamma=self.config.focal_gamma, alpha=self.config.focal_alpha)
            )
        return torch.sigmoid(linked)

    def total_loss(self, linked: Tensor, labels: Tensor) -> Tensor:
        if self.config.loss == "weighted":
            weight = self.config.positive_weight or (1 - self.mean) / self.mean
            shifted = linked + math.log(weight)
            return F.binary_cross_entropy_with_logits(
                shifted, labels, weight=1 + (weight - 1) * labels, reduction="sum"
            )
        loss = F.binary_cross_entropy_with_logits(linked, labels, reduction="none")
        if self.config.loss == "focal":
            alpha = self.config.focal_alpha
            missed = torch.sigmoid(torch.where(labels > 0, -linked, linked))
            loss = (
                torch.where(labels > 0, alpha, 1 - alpha) * missed**self.config.focal_gamma * loss
            )
        return loss.sum()

    # --- drawn negatives -------------------------------------------------------------------

    @property
    def pairs_per_target(self) -> int:
        return 1 if self._negatives is None else 1 + self._negatives.num

    def beside(self, keys: RowKeys, targets: Jagged, interactions: Tensor) -> tuple[Jagged, Tensor]:
        if self._negatives is None:
            return targets, interactions
        taken = rows_of_users(self._train, keys.users)
        taken = taken.with_values(self._items[taken.values]).to_sets()
        drawn = self._draw_beside(keys.noise.rows, targets.lengths, taken, keys.noise.step)
        return _side_by_side(targets, interactions, drawn)

    def held_out(self, split: Literal["valid", "test"]) -> Asked:
        asked = super().held_out(split)
        if self._negatives is None:
            return asked
        # Drawn for a user, dealt out to the user's targets in their order.
        num = torch.zeros_like(self.dataset.user_ids)
        num = num.index_add(0, asked.users, asked.targets.lengths)
        users = torch.nonzero(num > 0).squeeze(1)
        parts = [
            self._draw_beside(
                self.dataset.user_ids[some],
                num[some],
                self.dataset.interactions.select(some).to_sets(),
                SPLIT_CODES[split],
            )
            for some in users.split(USERS_AT_A_TIME)
        ]
        order = torch.zeros_like(num)
        order[users] = torch.arange(len(users))
        drawn = Jagged.stack(parts) if parts else Jagged(users, users.new_zeros(1))
        has_any = drawn.lengths > 0
        lengths = asked.targets.lengths * self._negatives.num
        row_of = order[asked.users]
        before = lengths.cumsum(0) - lengths
        first = before - before[torch.searchsorted(asked.users, asked.users)]
        lengths = torch.where(has_any[row_of], lengths, 0)
        beside = drawn.slices(drawn.offsets[row_of] + first, lengths)
        targets, interactions = _side_by_side(asked.targets, asked.interactions, beside)
        return dataclasses.replace(asked, targets=targets, interactions=interactions)

    def _draw_beside(self, rows: Tensor, num_clicks: Tensor, taken: Jagged, step: int) -> Jagged:
        """`num` items for each of the clicks (R,) of a row, none of its `taken` ones (ascending).

        A row that took every item gets none.

        Args:
            rows, step: as in `NegativeSampler.sample`.
        """
        assert self._negatives is not None
        has_others = taken.lengths < self.dataset.num_items
        wanted = torch.where(has_others, num_clicks * self._negatives.num, 0)
        most = int(wanted.max()) if len(wanted) else 0
        config = self._negatives.model_copy(update={"num": max(1, most)})
        sampler = build_sampler(config, self._item_counts, seed=self._seed, name=self.name)
        exclude = taken.filter(has_others[taken.rows])
        ids = sampler.sample(rows, step=step, exclude=exclude).ids
        return Jagged.from_lengths(ids[torch.arange(ids.shape[1]) < wanted.unsqueeze(1)], wanted)


def _side_by_side(clicked: Jagged, interactions: Tensor, drawn: Jagged) -> tuple[Jagged, Tensor]:
    """Each row's clicked items, then its drawn ones; and the interactions (P,) behind them."""
    lengths = clicked.lengths + drawn.lengths
    both = Jagged.stack([clicked, drawn])
    marks = torch.cat([interactions, torch.full_like(drawn.values, NO_INTERACTION)])
    order = both.rows.remainder(clicked.num_rows).argsort(stable=True)
    return Jagged.from_lengths(both.values[order], lengths), marks[order]


def focal_logit(linked: Tensor, *, gamma: float, alpha: float) -> Tensor:
    """The logit of the probability for which `linked` minimizes the expected focal loss.

    With q = sigmoid(linked) and φ(q) = q / ((1 − q)^γ − γ q (1 − q)^(γ−1) log q), the odds are
    (1 − α) / α · φ(q) / φ(1 − q): where the derivative of the expected loss is 0.
    """
    linked = linked.double().clamp(-30, 30)

    def log_phi(logit: Tensor) -> Tensor:
        log_q, log_rest = F.logsigmoid(logit), F.logsigmoid(-logit)
        slope = 1 - gamma * (log_q - log_rest).exp() * log_q
        return log_q - gamma * log_rest - slope.log()

    odds = log_phi(linked) - log_phi(-linked) + math.log((1 - alpha) / alpha)
    return odds.float()


def negatives_of(config: CtrConfig, dataset: PreparedDataset) -> Negatives | None:
    """What is drawn beside clicks, where the data has nothing but clicks."""
    is_given = config.positive_rating is not None or dataset.label is not None
    if is_given:
        if config.negatives is not None:
            raise ValueError(
                "finetune.ctr.negatives: the data says what was not clicked; drop negatives, or "
                "positive_rating and data.columns.label"
            )
        return None
    return config.negatives


def click_labels(config: CtrConfig, dataset: PreparedDataset) -> Tensor:
    """(N,) float32, 0 or 1 for every interaction.

    Raises:
        ValueError: nothing to make labels of, labels other than 0 and 1, or one class in training.
    """
    if config.positive_rating is not None:
        if dataset.rating is None:
            raise ValueError(
                "finetune.ctr.positive_rating: needs ratings, "
                "data.columns.rating is not set; set it"
            )
        labels = (dataset.rating >= config.positive_rating).float()
    elif dataset.label is not None:
        labels = dataset.label
    elif config.negatives is not None:
        return torch.ones(len(dataset.split))
    else:
        raise ValueError(
            "finetune.ctr: needs labels; set data.columns.label, or positive_rating to make "
            "clicks of ratings, or negatives, where every interaction is a click"
        )
    odd = labels[(labels != 0) & (labels != 1)]
    with raised_together():
        if len(odd):
            raise ValueError(
                f"finetune.ctr: labels must be 0 or 1, found {odd[0]:g}; mend the column"
            )
    share = mean_over_ranks(labels[dataset.split == TRAIN])
    if share in (0.0, 1.0):
        raise ValueError(
            f"finetune.ctr: every training label is {share:g}, nothing can be learned from that; "
            "give impressions without a click too, or change positive_rating"
        )
    return labels
