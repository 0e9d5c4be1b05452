"""Items and features by their numbers, from tables that a program holds as plain tensors.

The twin of `models.item_table`, `models.item_content` and `models.feature_encoder` for padded
input: −1 stands where there is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchrec_pt.int8 import quantized
from torchrec_pt.models.autoencoder import Autoencoder
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.models.item_content import RowHiding
from torchrec_pt.models.two_tower import Tower, TwoTower

Cells = Mapping[str, Tensor]  # name of a feature -> (N, M) int64 ids, or (N, width) float32


class Rows(nn.Module):
    """The rows of a table (N, D), which takes N (D + 8) bytes where it is int8."""

    def __init__(self, weight: Tensor, *, is_int8: bool) -> None:
        super().__init__()
        self.is_int8 = is_int8
        names = ("codes", "scale", "bias") if is_int8 else ("weight",)
        parts = quantized(weight) if is_int8 else (weight.detach(),)
        for name, part in zip(names, parts, strict=True):
            self.register_buffer(name, part)

    def forward(self, ids: Tensor) -> Tensor:
        """(…, D) float32 of ids (…) int64."""
        if not self.is_int8:
            return self.get_buffer("weight")[ids]
        codes, scale, bias = (self.get_buffer(name)[ids] for name in ("codes", "scale", "bias"))
        return codes.float() * scale + bias


class Fields(nn.Module):
    """One vector for each feature of an entity, as `FeatureEncoder` makes them."""

    def __init__(self, encoder: FeatureEncoder, *, is_int8: bool) -> None:
        super().__init__()
        self.dim = encoder.dim
        self.layers = encoder.layers
        self.tables = nn.ModuleDict()
        self._is_mean: dict[str, bool] = {}
        if encoder.tables is not None:
            for name, bag in encoder.tables.embedding_bags.items():
                self.tables[name] = Rows(bag.weight, is_int8=is_int8)
                self._is_mean[name] = bag.mode == "mean"

    @property
    def names(self) -> list[str]:
        return [*self.tables, *self.layers]

    def forward(self, cells: Cells) -> Tensor:
        """(N, F, D). Categories are (N, M) int64 vocabulary ids, −1 where there is none."""
        fields = [self._pooled(name, cells[name]) for name in self.tables]
        fields += [layer(cells[name]) for name, layer in self.layers.items()]
        return torch.stack(fields, dim=1)

    def _pooled(self, name: str, ids: Tensor) -> Tensor:
        is_value = ids >= 0
        # An empty cell is one of the unknown value, 0.
        is_first = torch.arange(ids.shape[1], device=ids.device) == 0
        is_value = is_value | (~is_value.any(dim=1, keepdim=True) & is_first)
        rows = self.tables[name](ids.clamp(min=0))
        summed = torch.where(is_value.unsqueeze(2), rows, 0.0).sum(1)
        return summed / is_value.sum(1, keepdim=True) if self._is_mean[name] else summed


class ItemCells(nn.Module):
    """The features of every item of the catalogue, by dense id."""

    def __init__(self, encoder: FeatureEncoder) -> None:
        super().__init__()
        self._names = list(encoder.cells())
        for name, cells in encoder.cells().items():
            self.register_buffer(name, cells)

    def forward(self, ids: Tensor) -> Cells:
        return {name: self.get_buffer(name)[ids] for name in self._names}


class Items(nn.Module):
    """Rows and vectors of items, as the backbone makes them."""

    def __init__(self, backbone: Backbone, *, is_int8: bool) -> None:
        super().__init__()
        self.row_dim = backbone.items.dim
        self.table = Rows(backbone.items.weight, is_int8=is_int8)
        self.tower: Tower | None = None
        hiding: RowHiding | None = None
        encoder: FeatureEncoder | None = None
        if isinstance(backbone, TwoTower):
            self.tower = backbone.item_tower
            hiding, encoder = backbone.hiding, backbone.item_features
        elif backbone.content is not None:
            hiding, encoder = backbone.content.hiding, backbone.content.features
        self._num_trained = None if hiding is None else hiding.num_trained
        self.fields: Fields | None = None
        self.cells: ItemCells | None = None
        if encoder is not None and encoder.num_fields:
            self.fields = Fields(encoder, is_int8=is_int8)
            self.cells = ItemCells(encoder)
        self._skipped = backbone.input_dim if isinstance(backbone, Autoencoder) else 0
        self._scaled = backbone.scaled

    def rows(self, ids: Tensor) -> Tensor:
        """(T, row_dim) of items (T,), with their content in them, as `Backbone.represent`."""
        return self._represented(self._trained_rows(ids), self._fields_of(ids))

    def vectors(self, ids: Tensor) -> Tensor:
        """(N, D) of items (N,)."""
        return self._encoded(self._trained_rows(ids), self._fields_of(ids))

    def new_vectors(self, cells: Cells) -> Tensor:
        """(N, D) of items that the catalogue does not have, by their features alone."""
        assert self.fields is not None
        fields = self.fields(cells)
        return self._encoded(fields.new_zeros(fields.shape[0], self.row_dim), fields)

    def _trained_rows(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        if self._num_trained is None:
            return rows
        return torch.where((ids >= self._num_trained).unsqueeze(1), 0.0, rows)

    def _fields_of(self, ids: Tensor) -> Tensor | None:
        if self.fields is None or self.cells is None:
            return None
        return self.fields(self.cells(ids))

    def _represented(self, rows: Tensor, fields: Tensor | None) -> Tensor:
        """A tower reads the features beside the row."""
        return rows if fields is None or self.tower is not None else rows + fields.sum(1)

    def _encoded(self, rows: Tensor, fields: Tensor | None) -> Tensor:
        if self.tower is not None:
            none = rows.new_zeros(rows.shape[0], 0, rows.shape[1])
            return self._scaled(self.tower(rows, none if fields is None else fields))
        return self._scaled(self._represented(rows, fields)[:, self._skipped :])
