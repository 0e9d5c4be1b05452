"""What the tasks that judge a user–item pair share: which rows are asked, and the prediction.

A training row is judged from what its user did before it. One cut through a user's training
rows serves several rows after it (as PinnerFormer's dense all-action loss, Pancha et al. 2022,
section 3.3): encoding a history is the costly part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import ModelConfig, PairConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows, rows_of_users
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import load_entity_features
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.splits import SPLIT_CODES, TRAIN
from torchrec_pt.distributed import sum_over_ranks
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.models.pair_head import PairHead, Pairs
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.rng import RowNoise


@dataclass(frozen=True)
class Asked:
    """Interactions to be judged, by row of interactions.parquet, and what was known before them.

    Attributes:
        users: (R,) int64, of this rank; −1 for a padding row.
        known: the interactions of every user that could be known, in time order.
        num_known: (R,) int64, how many of its user's were before the asked ones.
        targets: R rows of the interactions that are asked.
    """

    users: Tensor
    known: Jagged
    num_known: Tensor
    targets: Jagged

    def select(self, rows: Tensor) -> Asked:
        return Asked(self.users[rows], self.known, self.num_known[rows], self.targets.select(rows))

    def history(self, most: int) -> Jagged:
        """R rows of the newest known interactions, at most `most` each."""
        lengths = self.num_known.clamp(max=most)
        start = self.known.offsets[self.users.clamp(min=0)] + self.num_known - lengths
        return self.known.slices(start, lengths)


class PairTask(nn.Module, ABC):
    """A head on the backbone that gives each pair a number; `loss` compares it with a label.

    Args:
        labels: (N,) float32, one an interaction.
    """

    name: str
    scale = 1.0
    needs_catalogue = False

    def __init__(
        self, config: PairConfig, model: ModelConfig, dataset: PreparedDataset, labels: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.history_length = model.history_length
        is_train = dataset.split == TRAIN
        self._items = dataset.interactions.values
        self.labels = labels
        rows = torch.arange(len(labels))
        self._train = dataset.interactions.with_values(rows).filter(is_train)
        self.mean = mean_over_ranks(labels[is_train])
        self.shrinkage = config.shrinkage / self.information
        biases = item_biases(
            self._items[is_train], labels[is_train], self.mean, dataset.num_items, self.shrinkage
        )
        self.item_bias = nn.Embedding.from_pretrained(biases.unsqueeze(1), freeze=False)
        encoders: dict[str, FeatureEncoder] = {
            of: FeatureEncoder(load_entity_features(dataset, of), model.dim) for of in _ENTITIES
        }
        self.features = nn.ModuleDict(dict(encoders))
        num_fields = sum(encoder.num_fields for encoder in encoders.values())
        self.head = PairHead(
            model.dim,
            num_fields,
            config.hidden_dims,
            shrinkage=self.shrinkage,
            attention_weight=0.5 * self.information,
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
    def losses(self, linked: Tensor, labels: Tensor) -> Tensor:
        """(P,)"""

    # --- drawing ---------------------------------------------------------------------------

    def draw(self, rows: Rows) -> Draw:
        copies = self.config.cuts_per_user
        keys = rows.copies(copies)
        trained = rows_of_users(self._train, keys.users)
        lengths = trained.lengths
        lot = keys.noise.per_row(f"{self.name}.cut", 1).squeeze(1)
        cut = (lot * lengths).long().minimum((lengths - 1).clamp(min=0))
        num_targets = (lengths - cut).clamp(max=self.config.targets_per_cut)
        targets = trained.windows(cut, num_targets)
        return self.draw_asked(Asked(keys.users, self._train, cut, targets))

    def draw_asked(self, asked: Asked) -> Draw:
        history, targets = asked.history(self.history_length), asked.targets
        return Draw(
            lookups={
                "history": history.with_values(self._items[history.values]),
                "target": targets.with_values(self._items[targets.values]),
            },
            tensors={
                "history_label": self.labels[history.values],
                "label": self.labels[targets.values],
                "interaction": targets.values,
            },
        )

    # --- prediction ------------------------------------------------------------------------

    def loss(
        self, backbone: Backbone, drawn: Embedded, keys: RowKeys, catalogue: Catalogue | None
    ) -> LossTerm:
        keys = keys.copies(self.config.cuts_per_user)
        label = drawn.tensors["label"]
        linked = self._linked(backbone, drawn, keys.users, keys.noise)
        return LossTerm(self.losses(linked, label).sum(), label.new_tensor(float(len(label))))

    def predict(self, backbone: Backbone, drawn: Embedded, users: Tensor) -> Tensor:
        """(P,) in the unit of the labels."""
        return self.final(self._linked(backbone, drawn, users, None))

    def _linked(
        self, backbone: Backbone, drawn: Embedded, users: Tensor, noise: RowNoise | None
    ) -> Tensor:
        """(P,) the formula of `pair_head`."""
        history, target = drawn.ids["history"], drawn.ids["target"]
        rows, target_rows = drawn.vectors["history"], drawn.vectors["target"]
        row = target.rows
        expected = self.mean + self.item_bias(history.values).squeeze(1).detach()
        fields = [
            self.features["user"](users[row]),
            self.features["item"](target.values),
            self.features["interaction"](drawn.tensors["interaction"]),
        ]
        pairs = Pairs(
            users=backbone.encode_users(users, rows, noise),
            targets=target.with_values(backbone.encode_items(target.values, target_rows.values)),
            memory=history.with_values(backbone.encode_items(history.values, rows.values)),
            residuals=drawn.tensors["history_label"] - expected,
            fields=torch.cat(fields, dim=1),
        )
        drop = RowDropout(self.config.dropout, noise, f"{self.name}.dropout", row, target.positions)
        echo, learned = self.head(pairs, drop)
        return self.link(self.item_bias(target.values).squeeze(1) + echo) + learned

    def predict_by_biases(self, asked: Asked) -> Tensor:
        """(P,) prediction from the mean, the item's bias and the user's mean residual alone.

        Koren 2010, section 2.1, with the biases of training data; the user's from all of the
        history, where the head starts from half of that over the newest rows, and half of what
        the attention says.
        """
        biases = self.item_bias.weight.detach().squeeze(1).cpu().double()
        known = asked.known.values
        residuals = self.labels[known] - self.mean - biases[self._items[known]]
        sums = torch.cat([residuals.new_zeros(1), _cumsum_in_rows(asked.known, residuals)])
        end = asked.known.offsets[asked.users] + asked.num_known
        user = torch.where(asked.num_known > 0, sums[end], 0.0) / (
            asked.num_known + self.shrinkage
        ).clamp(min=1)
        deviation = user[asked.targets.rows] + biases[self._items[asked.targets.values]]
        return self.final(self.link(deviation)).float()


MOST_TARGETS = 64  # more would make a block of rows, padded to the longest, large
_ENTITIES: tuple[Literal["user", "item", "interaction"], ...] = ("user", "item", "interaction")


def held_out_pairs(dataset: PreparedDataset, split: Literal["valid", "test"]) -> Asked:
    """Every interaction of `split`; its user's earlier ones of the splits before it are known.

    Interactions of one user with the same history share a row, up to MOST_TARGETS of them.
    """
    code = SPLIT_CODES[split]
    rows = torch.arange(len(dataset.split))
    is_known = dataset.split < code
    known = dataset.interactions.with_values(rows).filter(is_known)
    num_known_before = is_known.cumsum(0) - is_known.long()
    asked = torch.nonzero(dataset.split == code).squeeze(1)
    user, before = dataset.interactions.rows[asked], num_known_before[asked]
    key = user * (len(rows) + 1) + before
    _, counts = torch.unique_consecutive(key, return_counts=True)
    place = Jagged.from_lengths(asked, counts).positions
    piece = torch.stack([key, place // MOST_TARGETS])
    _, counts = torch.unique_consecutive(piece, dim=1, return_counts=True)
    targets = Jagged.from_lengths(asked, counts)
    first = targets.offsets[:-1]
    users = user[first]
    return Asked(users, known, before[first] - known.offsets[users], targets)


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


def item_biases(
    items: Tensor, labels: Tensor, mean: float, num_items: int, shrinkage: float
) -> Tensor:
    """(num_items,) float32: each item's shrunk mean deviation from the mean label, over all ranks.

    Args:
        items: (N,) int64.  labels: (N,) float32; of this rank's training interactions.
    """
    sums = torch.zeros(num_items, dtype=torch.float64).index_add(0, items, labels.double())
    sums = sum_over_ranks(sums)
    counts = sum_over_ranks(torch.bincount(items, minlength=num_items))
    return ((sums - mean * counts) / (counts + shrinkage).clamp(min=1)).float()
