"""Rows of one catalogue's items, or of categories, read into a model of others, by value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.checkpoint import Checkpoint, as_text, parts_of, rows_per_block

# The parameters whose row i is item i, whatever their width, and their optimizer's states, named
# "<parameter>.<what>". Another tensor may have as many rows by accident.
_PER_ITEM = re.compile(r"\b(items\.collection\.embeddings\.item|item_bias)\.weight(\.|$)")
WHOLE_STATES = (".step", ".iter")  # one number for all rows


def per_item(names: Iterable[str]) -> list[str]:
    """Those tensors of a model and its optimizers that have one row an item.

    These are the item table of every backbone and the item biases of the pair tasks, with the
    states that their optimizers keep of each row. Whoever gives a module another parameter with
    one row an item names it here.
    """
    return [n for n in names if _PER_ITEM.search(n) and not n.endswith(WHOLE_STATES)]


@dataclass(frozen=True, eq=False)
class RowMatch:
    """Where the rows of a catalogue are in a checkpoint of another one.

    Attributes:
        source: (num_items,) int64: row in the checkpoint, −1 for an item that it does not know.
        num_saved: rows in the checkpoint.
        default: the row of the checkpoint that new ones start from; −1: from what they are.
    """

    source: Tensor
    num_saved: int
    default: int = -1

    @property
    def num_matched(self) -> int:
        return int((self.source >= 0).sum())

    @property
    def num_new(self) -> int:
        return len(self.source) - self.num_matched

    @property
    def num_dropped(self) -> int:
        """Rows of the checkpoint that nothing here stands for."""
        return self.num_saved - self.num_matched


def match_rows(saved: pl.Series, wanted: pl.Series) -> RowMatch:
    """Match external ids; "242" and 242 name the same item."""
    known = pl.DataFrame({"id": as_text(saved)}).with_row_index("row")
    rows = pl.DataFrame({"id": as_text(wanted)}).join(
        known, on="id", how="left", maintain_order="left"
    )["row"]
    source = torch.from_numpy(rows.cast(pl.Int64).fill_null(-1).to_numpy(writable=True))
    return RowMatch(source, len(saved))


def match_values(saved: pl.Series, wanted: pl.Series) -> RowMatch:
    """The same for a table of categories: its row 0 is the unknown one, row i + 1 value i.

    A value that the checkpoint does not know starts as what it made of unknown ones.
    """
    match = match_rows(saved, wanted)
    source = torch.where(match.source >= 0, match.source + 1, -1)
    return RowMatch(F.pad(source, (1, 0)), len(saved) + 1, default=0)


@torch.no_grad()
def read_rows(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], matches: Mapping[str, RowMatch]
) -> None:
    """Fill the matched rows of tensors that `Checkpoint.check` let pass, and by default new ones.

    Each rank reads the blocks of rows in which there is one of its own.
    """
    for name, tensor in tensors.items():
        for offsets, part in parts_of(tensor):
            _read_part(checkpoint, name, offsets, part, matches[name])


@torch.no_grad()
def clear_new_rows(tensor: Tensor, match: RowMatch) -> None:
    """Zeros in the rows of what the checkpoint does not know."""
    for offsets, part in parts_of(tensor):
        source = match.source[offsets[0] : offsets[0] + len(part)]
        part[(source < 0).to(part.device)] = 0


def _read_part(
    checkpoint: Checkpoint, name: str, offsets: tuple[int, ...], part: Tensor, match: RowMatch
) -> None:
    source = match.source[offsets[0] : offsets[0] + len(part)]
    source = torch.where(source >= 0, source, match.default)
    places = torch.nonzero(source >= 0).squeeze(1)
    source, order = source[places].sort()
    places = places[order]
    columns = [
        (offset, offset + size) for offset, size in zip(offsets[1:], part.shape[1:], strict=True)
    ]
    num_rows = rows_per_block(part.shape[1:], part.dtype)
    first = 0
    while first < len(source):
        begin = int(source[first])
        end = min(begin + num_rows, checkpoint.tensors[name].kept_shape[0])
        last = int(torch.searchsorted(source, end))
        rows = checkpoint.read(name, (begin, end), *columns)[source[first:last] - begin]
        part[places[first:last].to(part.device)] = rows.to(part.device)
        first = last
