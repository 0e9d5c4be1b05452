"""The programs that make vectors: of users by their histories, of items by id or by features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.ranking_head import InnerHead, MlpHead
from torchrec_pt.models.two_tower import TwoTower
from torchrec_pt.programs.items import Fields, Items
from torchrec_pt.programs.ports import FeatureInputs, Named, Port, history_ports, item_port
from torchrec_pt.programs.users import Padded, ages, build_users

Features = Mapping[str, FeatureInputs]  # "user", "item", "interaction"


class Program(nn.Module, ABC):
    """Tensors in the order of `inputs` to one tensor, `output`."""

    inputs: tuple[Port, ...]
    output: Port

    def forward(self, *given: Tensor) -> Tensor:
        names = (port.name for port in self.inputs)
        return self.run(dict(zip(names, given, strict=True)))

    @abstractmethod
    def run(self, given: Named) -> Tensor:
        """The output from the inputs by name."""


class Encoder(nn.Module):
    """A backbone whose tables are plain tensors, for padded input."""

    def __init__(self, backbone: Backbone, features: Features, *, is_int8: bool) -> None:
        super().__init__()
        self.dim = backbone.dim
        self.history_length = backbone.history_length
        self.reads_times = backbone.reads_times
        self.items = Items(backbone, is_int8=is_int8)
        self.users = build_users(backbone)
        self.fields: Fields | None = None
        if isinstance(backbone, TwoTower) and backbone.user_features.num_fields:
            self.fields = Fields(backbone.user_features, is_int8=is_int8)
            self._features = features["user"]

    def ports(self, *, with_times: bool = False) -> list[Port]:
        """with_times: whether somebody beside the backbone reads them."""
        own = [] if self.fields is None else self._features.ports("batch")
        return history_ports(with_times=with_times or self.reads_times) + own

    def read(self, given: Named) -> Padded:
        """The whole history."""
        history = given["history"]
        rows = self.items.rows(history.clamp(min=0).flatten()).unflatten(0, history.shape)
        return Padded(history >= 0, ages(history), rows, given.get("times"))

    def of_users(self, history: Padded, given: Named) -> Tensor:
        """(batch, D) by the newest items."""
        fields = None if self.fields is None else self.fields(self._features.cells(given))
        return self.users(history.newest(self.history_length), fields)


class UserEncoder(Program):
    """The map of a linear head is in the vectors, as in exported ones."""

    def __init__(self, encoder: Encoder, head: InnerHead) -> None:
        super().__init__()
        self.encoder = encoder
        # The vectors under an mlp head are the backbone's own.
        self.head = InnerHead() if isinstance(head, MlpHead) else head
        self.inputs = tuple(encoder.ports())
        self.output = Port("users", torch.float32, ("batch", encoder.dim), "a vector a user")

    def run(self, given: Named) -> Tensor:
        return self.head.user_vectors(self.encoder.of_users(self.encoder.read(given), given))


class ItemEncoder(Program):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.items = encoder.items
        self.inputs = (item_port("rows"),)
        self.output = Port("vectors", torch.float32, ("rows", encoder.dim), "a vector an item")

    def run(self, given: Named) -> Tensor:
        return self.items.vectors(given["items"])


class NewItemEncoder(Program):
    """Items that the catalogue does not have, by their features alone."""

    def __init__(self, encoder: Encoder, features: Features) -> None:
        super().__init__()
        self.items = encoder.items
        self._features = features["item"]
        self.inputs = tuple(self._features.ports("rows"))
        self.output = Port("vectors", torch.float32, ("rows", encoder.dim), "a vector an item")

    def run(self, given: Named) -> Tensor:
        return self.items.new_vectors(self._features.cells(given))
