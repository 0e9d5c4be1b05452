"""The programs that judge items for users: a score that ranks, a click's probability, a rating."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.models.pair_head import PairHead, time_between
from torchrec_pt.models.ranking_head import InnerHead, MlpHead
from torchrec_pt.programs.encoders import Encoder, Features, Program
from torchrec_pt.programs.items import Fields, ItemCells
from torchrec_pt.programs.ports import Named, Port, item_port
from torchrec_pt.programs.users import Padded
from torchrec_pt.tasks.ctr import CtrTask
from torchrec_pt.tasks.pairs import PairTask

_PAIRS = ("batch", "items")


class RankingScorer(Program):
    """Scores of any items of the catalogue; the head's, or inner products."""

    def __init__(
        self, encoder: Encoder, head: InnerHead, features: Features, *, is_int8: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.fields: PairFields | None = None
        self.head: InnerHead = InnerHead()
        if isinstance(head, MlpHead):
            self.fields = PairFields(
                features, head.users, head.items, cells=encoder.items.cells, is_int8=is_int8
            )
            self.interactions, self.hidden, self.out = head.interactions, head.hidden, head.out
        else:
            self.head = head
        own = [] if self.fields is None else self.fields.ports()
        self.inputs = _once([*encoder.ports(), *own, item_port(*_PAIRS)])
        self.output = Port("scores", torch.float32, _PAIRS, "higher is better")

    def run(self, given: Named) -> Tensor:
        items = given["items"]
        user = self.encoder.of_users(self.encoder.read(given), given)
        item = self.encoder.items.vectors(items.flatten())
        if self.fields is None:
            user = self.head.user_vectors(user)
            return (user.unsqueeze(1) * item.unflatten(0, items.shape)).sum(2)
        user = _for_each_item(user, items)
        x = self.interactions(user, item, self.fields(given))
        for layer in self.hidden:
            x = F.gelu(layer(x))
        return ((user * item).sum(1) + self.out(x).squeeze(1)).view(items.shape)


class PairScorer(Program):
    """The twin of `PairTask.predict` and `PairHead`, for padded rows of pairs."""

    def __init__(
        self, encoder: Encoder, task: PairTask, features: Features, *, is_int8: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.context_length = task.history_length
        self.reads_labels = task.reads_labels
        self.reads_times = task.dataset.timestamp is not None
        self.mean = task.mean
        catalogue = torch.arange(task.dataset.num_items)
        self.register_buffer("bias", task.item_biases(catalogue).detach())
        self._link, self._final = task.link, task.final
        self.head: PairHead = task.head
        encoders = cast(Mapping[str, FeatureEncoder], task.features)
        self.fields = PairFields(
            features,
            encoders["user"],
            encoders["item"],
            encoders["interaction"],
            cells=encoder.items.cells,
            is_int8=is_int8,
        )
        self.inputs = _once(
            [
                *encoder.ports(with_times=self.reads_times),
                *([_history_labels(task)] if self.reads_labels else []),
                *self.fields.ports(),
                item_port(*_PAIRS),
                *([_item_times()] if self.reads_times else []),
            ]
        )
        is_ctr = isinstance(task, CtrTask)
        meaning = "the probability of a click" if is_ctr else "the rating, in the unit of the data"
        self.output = Port("predictions", torch.float32, _PAIRS, meaning)

    def run(self, given: Named) -> Tensor:
        items = given["items"]
        memory = self.encoder.read(given).newest(self.context_length)
        users = self.encoder.of_users(memory, given)
        history = given["history"].clamp(min=0)
        bias = self.get_buffer("bias")
        if self.reads_labels:
            residuals = given["labels"] - (self.mean + bias[history])
        else:
            residuals = torch.full(history.shape, torch.nan, device=history.device)
        between = None
        if self.reads_times:
            between = time_between(given["times"], given["item_times"])
        memory_vectors = self.encoder.items.vectors(history.flatten())
        memory_vectors = memory_vectors.unflatten(0, history.shape)
        targets = self.encoder.items.vectors(items.flatten()).unflatten(0, items.shape)
        judged = self._judged(memory, memory_vectors, residuals, users, targets, between, given)
        linked = self._link(bias[items.flatten()] + judged[0]) + judged[1]
        return self._final(linked).view(items.shape)

    def _judged(
        self,
        memory: Padded,
        vectors: Tensor,
        residuals: Tensor,
        users: Tensor,
        targets: Tensor,
        between: Tensor | None,
        given: Named,
    ) -> tuple[Tensor, Tensor]:
        """(P,) deviations and (P,) of the MLP, as `PairHead` names them.

        Args:
            vectors: (R, L, D) of the history's items. residuals: (R, L), NaN where unknown.
            users: (R, D). targets: (R, C, D). between: (R, C, L) or None.
        """
        head = self.head
        is_known = memory.is_read & ~residuals.isnan()
        residuals = torch.where(is_known, residuals, 0.0)
        mean = residuals.sum(1) / (is_known.sum(1) + head.shrinkage).clamp(min=1)
        beyond = torch.where(is_known, residuals - mean.unsqueeze(1), 0.0)
        attended, echo = self._attended(memory, vectors, beyond, is_known, targets, between)
        user_fields, item_fields, other_fields = self.fields.parts(given)
        factored = self._factored(memory, vectors, beyond, targets, user_fields, item_fields)
        echoes = torch.cat([_for_each_item(mean.unsqueeze(1), targets), echo], dim=1)
        deviation = echoes @ head.echo_weight + head.factor_weight * factored
        fields = torch.cat([attended.unsqueeze(1), user_fields, item_fields, other_fields], dim=1)
        x = head.interactions(_for_each_item(users, targets), targets.flatten(0, 1), fields)
        x = torch.cat([x, echoes, factored.unsqueeze(1)], dim=1)
        for layer in head.hidden:
            x = F.gelu(layer(x))
        return deviation, head.out(x).squeeze(1)

    def _attended(
        self,
        memory: Padded,
        vectors: Tensor,
        beyond: Tensor,
        is_known: Tensor,
        targets: Tensor,
        between: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(P, D) and (P, num_heads), as `HistoryAttention`."""
        attention = self.head.attention
        query, key = (attention.likeness(attention.norm(each)) for each in (targets, vectors))
        told = torch.stack([beyond, is_known.float()], dim=2)
        both = attention.attend(
            query, key, attention.value(vectors), told, ~memory.is_read, between
        ).flatten(0, 1)
        return both[:, : -attention.num_heads], both[:, -attention.num_heads :]

    def _factored(
        self,
        memory: Padded,
        vectors: Tensor,
        beyond: Tensor,
        targets: Tensor,
        user_fields: Tensor,
        item_fields: Tensor,
    ) -> Tensor:
        """(P,) t_ui, as `Factors`."""
        factors = self.head.factors
        told = memory.sums(beyond.unsqueeze(2) * factors.said(vectors) + factors.taken(vectors))
        told = told / (memory.num_read + 1).sqrt().unsqueeze(1)
        user = _for_each_item(told, targets) + user_fields.sum(1)
        item = factors.asked(targets.flatten(0, 1)) + item_fields.sum(1)
        return (user * item).sum(1)


class PairFields(nn.Module):
    """Vectors (P, F, D) of the features of users, items and interactions, a pair a row.

    Args:
        cells: the encoder's, where it has them; they are the same and are stored once then.
    """

    def __init__(
        self,
        features: Features,
        users: FeatureEncoder,
        items: FeatureEncoder,
        others: FeatureEncoder | None = None,
        *,
        cells: ItemCells | None,
        is_int8: bool,
    ) -> None:
        super().__init__()
        self.dim = users.dim
        self._features = features
        self.users = Fields(users, is_int8=is_int8) if users.num_fields else None
        self.items = Fields(items, is_int8=is_int8) if items.num_fields else None
        self.cells = ItemCells(items) if cells is None else cells
        self.others = None
        if others is not None and others.num_fields:
            self.others = Fields(others, is_int8=is_int8)

    def ports(self) -> list[Port]:
        users = [] if self.users is None else self._features["user"].ports("batch")
        others = [] if self.others is None else self._features["interaction"].ports(*_PAIRS)
        return users + others

    def forward(self, given: Named) -> Tensor:
        return torch.cat(self.parts(given), dim=1)

    def parts(self, given: Named) -> tuple[Tensor, Tensor, Tensor]:
        """Of users, of items, of interactions."""
        items = given["items"]
        none = torch.zeros(items.shape[0] * items.shape[1], 0, self.dim, device=items.device)
        user = item = other = none
        if self.users is not None:
            user = _for_each_item(self.users(self._features["user"].cells(given)), items)
        if self.items is not None:
            item = self.items(self.cells(items.flatten()))
        if self.others is not None:
            other = self.others(self._features["interaction"].cells(given))
        return user, item, other


def _for_each_item(users: Tensor, items: Tensor) -> Tensor:
    """(R · C, …): a row of users (R, …) for each of their items (R, C, …)."""
    shape = (users.shape[0], items.shape[1], *users.shape[1:])
    return users.unsqueeze(1).expand(shape).flatten(0, 1)


def _once(ports: Iterable[Port]) -> tuple[Port, ...]:
    """User features may be asked for by the backbone and by the head."""
    return tuple({port.name: port for port in ports}.values())


def _item_times() -> Port:
    meaning = "when each pair is asked, in the unit of the data; NaN where it is not known"
    return Port("item_times", torch.float64, _PAIRS, meaning)


def _history_labels(task: PairTask) -> Port:
    what = "1 for a click, 0 for none" if isinstance(task, CtrTask) else "the rating"
    meaning = f"what the user said of each item of the history: {what}; NaN where it is not known"
    return Port("labels", torch.float32, ("batch", "history"), meaning)
