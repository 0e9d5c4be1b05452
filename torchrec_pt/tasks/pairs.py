"""What the tasks that judge a user–item pair share: which rows are asked, and the prediction.

A training row is judged from what its user did before it, or from all else that its user did. One
history serves several asked rows (as PinnerFormer's dense all-action loss, Pancha et al. 2022,
section 3.3): encoding a history is the costly part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import ModelConfig, PairConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows, rows_of_users
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import load_entity_features
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.splits import TRAIN
from torchrec_pt.distributed import sum_over_ranks
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.dropout import ItemDropout, RowDropout
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.models.pair_head import Judged, PairDropout, PairHead, Pairs
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.objectives.lots import draw_place
from torchrec_pt.rng import RowNoise
from torchrec_pt.tasks.asked import NO_INTERACTION, Asked, held_out_pairs
from torchrec_pt.tasks.labels import labelled

_ENTITIES: tuple[Literal["user", "item", "interaction"], ...] = ("user", "item", "interaction")


class PairTask(nn.Module, ABC):
    """A head on the backbone that gives each pair a number; `loss` compares it with a label.

    Args:
        labels: (N,) float32, one an interaction.
        seed: of the run; draws the labels that `label_fraction` leaves.
    """

    name: str
    _deviation: Tensor
    _count: Tensor
    scale = 1.0
    needs_catalogue = False

    def __init__(
        self,
        config: PairConfig,
        model: ModelConfig,
        dataset: PreparedDataset,
        labels: Tensor,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        if model.dim % config.attention_heads:
            raise ValueError(
                f"finetune.{self.name}.attention_heads: must divide model.dim ({model.dim}), given "
                f"{config.attention_heads}; use a power of 2"
            )
        self.config = config
        self.dataset = dataset
        self.history_length = config.context_length or model.history_length
        self._encoded_length = model.history_length
        self._items = dataset.interactions.values
        self.labels = labels
        self._is_labelled = labelled(dataset, config.label_fraction, seed)
        # What a history tells of its labels; NaN where nothing is known.
        self._told = torch.where(self._is_labelled, labels, torch.nan)
        rows = dataset.interactions.with_values(torch.arange(len(labels)))
        is_train = dataset.split == TRAIN
        self._train = rows.filter(is_train)
        self._place = is_train.cumsum(0) - 1 - self._train.offsets[rows.rows]
        self._askable = rows.filter(is_train & self._is_labelled)
        self._mean_num_asked = self._expected_num_asked()
        asked = self._askable.values
        self.mean = self._mean_label(labels[asked])
        self.shrinkage = config.shrinkage / self.information
        deviations = self._deviations(labels[asked], self._items[asked])
        self.register_buffer("_deviation", deviations[0], persistent=False)
        self.register_buffer("_count", deviations[1], persistent=False)
        self.item_bias = nn.Embedding(dataset.num_items, 1)
        nn.init.zeros_(self.item_bias.weight)
        encoders: dict[str, FeatureEncoder] = {
            of: FeatureEncoder(load_entity_features(dataset, of), model.dim) for of in _ENTITIES
        }
        self.features = nn.ModuleDict(dict(encoders))
        num_fields = sum(encoder.num_fields for encoder in encoders.values())
        self.head = PairHead(
            model.dim,
            num_fields,
            config.hidden_dims,
            interactions=config.interactions,
            num_heads=config.attention_heads,
            shrinkage=self.shrinkage,
            attention_weight=0.5 * self.information,
            factor_weight=self.information,
        )

    # --- the task's own ---------------------------------------------------------------------

    @property
    @abstractmethod
    def information(self) -> float:
        """What one label tells of a mean, beside one of the most telling kind; in (0, 1]."""

    @abstractmethod
    def link(self, deviation: Tensor) -> Tensor:
        """(P,) prediction before its final form, from the deviation from the mean label."""

    @abstractmethod
    def final(self, linked: Tensor) -> Tensor:
        """(P,) prediction in the unit of the labels."""

    @abstractmethod
    def total_loss(self, linked: Tensor, labels: Tensor) -> Tensor:
        """0-dim, summed over this rank's pairs; its gradient is that of the sum over all ranks."""

    def _mean_label(self, labels: Tensor) -> float:
        return mean_over_ranks(labels)

    def _deviations(self, labels: Tensor, items: Tensor) -> Tensor:
        return label_sums(items, labels.double() - self.mean, self.dataset.num_items)

    @property
    def reads_labels(self) -> bool:
        """Whether what a history tells of its labels makes a difference."""
        return not bool(self._told.isnan().all())

    @property
    def pairs_per_target(self) -> int:
        """How many pairs a target stands for, with what is drawn beside it in training."""
        return 1

    # --- drawing ---------------------------------------------------------------------------

    def _expected_num_asked(self) -> float:
        """Targets of a row in training, on average over lots and over the users of all ranks."""
        num, most = self._askable.lengths.double(), float(self.config.targets_per_cut)
        if self.config.context == "others":
            asked = _share_asked(num).clamp(max=most)
        else:
            # The mean over the cuts of min(labels after it, most).
            whole = num.clamp(max=most)
            asked = whole * (whole + 1) / 2 + (num - whole) * most
            asked = asked / num.clamp(min=1)
        num_users = (self._train.lengths > 0).sum()
        total, users = sum_over_ranks(torch.stack([asked.sum(), num_users.double()])).tolist()
        return total / users if users else 0.0

    def draw(self, rows: Rows) -> Draw:
        keys = rows.copies(self.config.cuts_per_user)
        if self.config.context == "others":
            history, targets = self._draw_among_all(keys)
        else:
            history, targets = self._draw_after_cut(keys)
        items, interactions = self.beside(
            keys, targets.with_values(self._items[targets.values]), targets.values
        )
        return self._draw_pairs(history.tail(self.history_length), items, interactions)

    def beside(self, keys: RowKeys, targets: Jagged, interactions: Tensor) -> tuple[Jagged, Tensor]:
        """What is asked in training: the targets (items) and what a task draws beside them."""
        return targets, interactions

    def _draw_after_cut(self, keys: RowKeys) -> tuple[Jagged, Jagged]:
        """(what stands before, what is asked), rows of interactions.parquet."""
        askable = rows_of_users(self._askable, keys.users)
        lengths = askable.lengths
        lot = keys.noise.per_row(f"{self.name}.cut", 1).squeeze(1)
        cut = draw_place(lot, (lengths - 1).clamp(min=0))
        targets = askable.windows(cut, (lengths - cut).clamp(max=self.config.targets_per_cut))
        num_before = torch.zeros_like(lengths)
        is_asked = targets.lengths > 0
        num_before[is_asked] = self._place[targets.values[targets.offsets[:-1][is_asked]]]
        before = rows_of_users(self._train, keys.users)
        return before.windows(0 * num_before, num_before), targets

    def _draw_among_all(self, keys: RowKeys) -> tuple[Jagged, Jagged]:
        """The same where asked rows lie anywhere; at most a third of a user's labels are asked."""
        rows = rows_of_users(self._train, keys.users)
        is_askable = self._is_labelled[rows.values]
        lots = keys.noise.per_token(f"{self.name}.asked", rows.rows, rows.positions)
        order = rows.with_values(torch.where(is_askable, lots, 2.0)).argsort()
        num_askable = torch.zeros_like(rows.lengths).index_add(0, rows.rows, is_askable.long())
        num_asked = _share_asked(num_askable).clamp(max=self.config.targets_per_cut)
        is_asked = torch.zeros_like(is_askable)
        is_asked[order] = rows.positions < num_asked[rows.rows]
        others = rows.filter(~is_asked & (num_asked > 0)[rows.rows])
        return others, rows.filter(is_asked)

    def held_out(self, split: Literal["valid", "test"]) -> Asked:
        """What this rank's users are asked of a split."""
        return held_out_pairs(self.dataset, split, self.config.context)

    def draw_asked(self, asked: Asked) -> Draw:
        history = asked.history(self.history_length)
        return self._draw_pairs(history, asked.targets, asked.interactions)

    def _draw_pairs(self, history: Jagged, targets: Jagged, interactions: Tensor) -> Draw:
        """`history`: rows of interactions.parquet; `targets`: items."""
        tensors = {
            "history_label": self._told[history.values],
            "label": self.labels_of(interactions),
            "interaction": interactions,
        }
        times = self.dataset.timestamp
        if times is not None:
            tensors["history_time"] = times[history.values]
            tensors["time"] = torch.where(interactions >= 0, times[interactions], torch.nan)
        return Draw(
            lookups={
                "history": history.with_values(self._items[history.values]),
                "target": targets,
            },
            tensors=tensors,
        )

    def draw_unrecorded(self, history: Jagged, targets: Jagged) -> Draw:
        """Rows of items (targets) that are asked of somebody whose history, of items too, stands
        in no file: its labels and times are unknown."""
        history = history.tail(self.history_length)
        unknown, asked = history.values, targets.values
        tensors = {
            "history_label": torch.full(unknown.shape, torch.nan),
            "interaction": torch.full_like(asked, NO_INTERACTION),
        }
        if self.dataset.timestamp is not None:
            tensors["history_time"] = torch.full(unknown.shape, torch.nan, dtype=torch.float64)
            tensors["time"] = torch.full(asked.shape, torch.nan, dtype=torch.float64)
        return Draw(lookups={"history": history, "target": targets}, tensors=tensors)

    def labels_of(self, interactions: Tensor) -> Tensor:
        """(P,) float32; what was drawn and never happened is 0."""
        return torch.where(interactions == NO_INTERACTION, 0.0, self.labels[interactions])

    # --- prediction ------------------------------------------------------------------------

    def loss(
        self, backbone: Backbone, drawn: Embedded, keys: RowKeys, catalogue: Catalogue | None
    ) -> LossTerm:
        keys = keys.copies(self.config.cuts_per_user)
        label = drawn.tensors["label"]
        # Without the asked label itself, which a held-out pair's bias does not know either.
        own = torch.where(drawn.tensors["interaction"] == NO_INTERACTION, torch.nan, label)
        linked, size = self._linked(backbone, drawn, keys.users, keys.noise, own)
        total = self.total_loss(linked, label) + self.config.factor_l2 * size.sum()
        # Not their number: users come to a batch by length, so the pairs of a batch of short
        # histories, few as they are, would weigh as much as the many of one of long histories.
        expected = self._mean_num_asked * self.pairs_per_target * keys.weight.sum()
        return LossTerm(total, expected.to(total))

    def predict(self, backbone: Backbone, drawn: Embedded, users: Tensor) -> Tensor:
        """(P,) in the unit of the labels."""
        linked, _ = self._linked(backbone, drawn, users)
        return self.final(linked)

    def _linked(
        self,
        backbone: Backbone,
        drawn: Embedded,
        users: Tensor,
        noise: RowNoise | None = None,
        own: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(P,) the formula of `pair_head`, and (P,) the squared sizes of its factors.

        Args:
            own: (P,) labels that the items' deviations hold and must not; NaN or None for none.
        """
        tensors = drawn.tensors
        history, target = drawn.ids["history"], drawn.ids["target"]
        rows, target_rows = drawn.vectors["history"], drawn.vectors["target"]
        row = target.rows
        expected = self.mean + self.item_biases(history.values).detach()
        pairs = Pairs(
            users=backbone.encode_users(users, rows.tail(self._encoded_length), noise),
            targets=Jagged(
                backbone.encode_items(target.values, target_rows.values),
                target.offsets,
                tensors.get("time"),
            ),
            memory=Jagged(
                backbone.encode_items(history.values, rows.values),
                history.offsets,
                tensors.get("history_time"),
            ),
            residuals=tensors["history_label"] - expected,
            user_fields=self.features["user"](users[row]),
            item_fields=self.features["item"](target.values),
            other_fields=self.features["interaction"](tensors["interaction"]),
        )
        p, name = self.config.dropout, f"{self.name}.dropout"
        drop = PairDropout(
            hidden=RowDropout(p, noise, name, row, target.positions),
            users=RowDropout(p, noise, f"{name} of users", row, 0 * row),
            items=ItemDropout(p, noise, f"{name} of items", target.values),
            memory=RowDropout(p, noise, f"{name} of memory", history.rows, history.positions),
        )
        judged: Judged = self.head(pairs, drop)
        deviation = self.item_biases(target.values, own) + judged.deviation
        return self.link(deviation) + judged.learned, judged.size

    def item_biases(self, items: Tensor, own: Tensor | None = None) -> Tensor:
        """(T,) shrunk mean deviations of the items (T,) without the labels `own`, and what is
        learned beyond them."""
        deviation, count = self._deviation[items], self._count[items]
        if own is not None:
            is_own = ~own.isnan()
            deviation = deviation - torch.where(is_own, own - self.mean, 0.0)
            count = count - is_own.float()
        closed = deviation / (count + self.shrinkage).clamp(min=1)
        return closed + self.item_bias(items).squeeze(1)

    def predict_by_biases(self, asked: Asked) -> Tensor:
        """(P,) prediction from the mean, the item's bias and the user's mean residual alone.

        Koren 2010, section 2.1, with the biases of training data; the user's from all of the
        history, where the head starts from that over the newest rows, and half of what the
        attention says beyond it.
        """
        biases = (self._deviation / (self._count + self.shrinkage).clamp(min=1)).cpu().double()
        known = asked.known.values
        residuals = self._told[known] - self.mean - biases[self._items[known]]
        told = ~residuals.isnan()
        sums, nums = (
            torch.cat([x.new_zeros(1), _cumsum_in_rows(asked.known, x)])
            for x in (residuals.nan_to_num(0.0), told.double())
        )
        end = asked.known.offsets[asked.users] + asked.num_known
        is_known = asked.num_known > 0
        user = torch.where(is_known, sums[end], 0.0)
        user = user / (torch.where(is_known, nums[end], 0.0) + self.shrinkage).clamp(min=1)
        deviation = user[asked.targets.rows] + biases[asked.targets.values]
        return self.final(self.link(deviation)).float()


def _share_asked(num_askable: Tensor) -> Tensor:
    """A third of a user's labels, rounded up; the others are what is told."""
    return torch.div(num_askable + 2, 3, rounding_mode="floor")


def _cumsum_in_rows(jagged: Jagged, values: Tensor) -> Tensor:
    """(T,) running sums of values (T,) in each row, with the same bits whatever rows stand before.

    Doubled in span until the longest row is covered (Hillis & Steele 1986).
    """
    positions = jagged.positions
    longest = int(positions.max()) + 1 if len(positions) else 0
    span = 1
    while span < longest:
        before = F.pad(values[:-span], (span, 0))
        values = values + torch.where(positions >= span, before, 0.0)
        span *= 2
    return values


def mean_over_ranks(labels: Tensor) -> float:
    """The mean of the labels of all ranks; sums of ratings and clicks are exact in any order."""
    total, num = sum_over_ranks(torch.tensor([labels.double().sum(), len(labels)])).tolist()
    return total / num


def label_sums(items: Tensor, values: Tensor, num_items: int) -> Tensor:
    """(2, num_items) float32: the sum of each item's values (N,) and their number, of all ranks."""
    sums = torch.zeros(num_items, dtype=torch.float64).index_add(0, items, values.double())
    counts = torch.bincount(items, minlength=num_items)
    return sum_over_ranks(torch.stack([sums, counts.double()])).float()
