"""One vector for each feature of an entity: tables for categories, linear layers for numbers."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_pt.data.entity_features import UNKNOWN, EntityFeatures
from torchrec_pt.data.jagged import Jagged

INIT_STD = 0.02


class FeatureEncoder(nn.Module):
    """A categorical cell is the mean or the sum of its values' rows in a TorchRec table.

    Tables and layers are named after their columns, `user.gender` as `user_gender`. The features
    themselves are buffers that checkpoints leave out: the prepared dataset holds them. Their row
    0 is an entity of which nothing is known, so that row i + 1 is entity i.
    """

    def __init__(self, features: EntityFeatures, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_fields = features.num_fields
        self._tables = {c: module_name(features.of, c) for c in features.categorical}
        self._layers = {c: module_name(features.of, c) for c in features.dense}
        self.tables: EmbeddingBagCollection | None = None
        if self._tables:
            configs = [
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=features.num_values[column],
                    embedding_dim=dim,
                    feature_names=[name],
                    pooling=PoolingType[features.pooling[column].upper()],
                )
                for column, name in self._tables.items()
            ]
            self.tables = EmbeddingBagCollection(tables=configs, device=torch.device("cpu"))
            for weight in self.tables.parameters():
                nn.init.normal_(weight, std=INIT_STD)
        self.layers = nn.ModuleDict(
            {
                self._layers[column]: _small_linear(values.shape[1], dim)
                for column, values in features.dense.items()
            }
        )
        for name, values in self._rows(features).items():
            self.register_buffer(name, values, persistent=False)

    def over(self, features: EntityFeatures) -> FeatureEncoder:
        """The same tables and layers, read for other entities; features of the same columns."""
        other = copy.copy(self)
        device = next(self.parameters()).device if self.num_fields else None
        other._buffers = {name: rows.to(device) for name, rows in self._rows(features).items()}
        return other

    def _rows(self, features: EntityFeatures) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = {}
        unknown = Jagged(torch.tensor([UNKNOWN]), torch.tensor([0, 1]))
        for column, name in self._tables.items():
            cells = Jagged.stack([unknown, features.categorical[column]])
            rows |= {f"{name}_values": cells.values, f"{name}_offsets": cells.offsets}
        for column, name in self._layers.items():
            values = features.dense[column]
            rows[f"{name}_dense"] = torch.cat([values.new_zeros(1, values.shape[1]), values])
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """(B, num_fields, dim) of entities (B,) int64; of −1 nothing is known."""
        if not len(ids):  # TorchRec wants a row; DDP wants every parameter used
            return self(ids.new_full((1,), -1))[:0]
        rows = ids.clamp(min=-1) + 1
        fields: list[Tensor] = []
        if self.tables is not None:
            cells = [self._cells(name).select(rows) for name in self._tables.values()]
            bags = KeyedJaggedTensor(
                keys=list(self._tables.values()),
                values=torch.cat([cell.values for cell in cells]),
                lengths=torch.cat([cell.lengths for cell in cells]),
            )
            fields.append(self.tables(bags).values().unflatten(1, (-1, self.dim)))
        for name, layer in self.layers.items():
            fields.append(layer(self.get_buffer(f"{name}_dense")[rows]).unsqueeze(1))
        if not fields:
            return torch.zeros(len(ids), 0, self.dim, device=ids.device)
        return torch.cat(fields, dim=1)

    def cells(self) -> dict[str, Tensor]:
        """What is known of every entity, by the names of tables and layers; row i is entity i.

        (N, most values of a cell) int64 of categories, −1 after the last; (N, width) float32 else.
        """
        cells: dict[str, Tensor] = {}
        for name in self._tables.values():
            known = self._cells(name)
            padded = known.values.new_full((known.num_rows, int(known.lengths.max())), -1)
            padded[known.rows, known.positions] = known.values
            cells[name] = padded[1:]
        for name in self.layers:
            cells[name] = self.get_buffer(f"{name}_dense")[1:]
        return cells

    def _cells(self, name: str) -> Jagged:
        return Jagged(self.get_buffer(f"{name}_values"), self.get_buffer(f"{name}_offsets"))


def module_name(of: str, column: str) -> str:
    """A name that a module may bear, another one for every column: odd characters are encoded."""
    odd = re.sub(r"[^\w-]", lambda found: f"%{ord(found[0]):X}%", column)
    return f"{of}_{odd}"


def _small_linear(width: int, dim: int) -> nn.Linear:
    """torch's own start would outweigh the tables: 0.6 an element where a number comes in."""
    layer = nn.Linear(width, dim)
    nn.init.normal_(layer.weight, std=INIT_STD)
    nn.init.zeros_(layer.bias)
    return layer
