"""Which items may be offered: by their features, by lists of what is available or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl
import torch
from torch import Tensor

from torchrec_pt.external_ids import ExternalId

ExternalIds = Sequence[ExternalId]


@dataclass(frozen=True)
class ItemFilter:
    """Every condition must hold; values and ids are compared as texts.

    Attributes:
        where: item feature -> values, of which the item has at least one.
        only: external ids of the items that are candidates; None: all.
        without: external ids of items that are none.
    """

    where: Mapping[str, ExternalIds] = field(default_factory=dict)
    only: ExternalIds | None = None
    without: ExternalIds = ()

    def allowed(self, items: pl.DataFrame, places_of: Callable[[ExternalIds], Tensor]) -> Tensor:
        """(num_items,) bool: which items pass.

        Args:
            items: row = dense item id, the columns of items.parquet.
            places_of: external ids (N) -> dense ids (N,); raises for one that is unknown.
        Raises:
            ValueError: no such feature, or values that are no list.
        """
        allowed = torch.ones(items.height, dtype=torch.bool)
        if self.only is not None:
            allowed[:] = False
            allowed[places_of(_listed("only", self.only))] = True
        allowed[places_of(_listed("without", self.without))] = False
        for column, values in self.where.items():
            known = [name for name in items.columns if name not in ("external_id", "count")]
            if column not in known:
                raise ValueError(
                    f'filter.where: no item feature "{column}"; use some of '
                    f"{', '.join(known) or 'none, the data has no item features'}"
                )
            has_any = _has_any(items[column], _listed(f"where.{column}", values))
            allowed &= torch.from_numpy(has_any.to_numpy(writable=True))
        return allowed


def _listed(name: str, values: ExternalIds) -> ExternalIds:
    if isinstance(values, str):
        raise ValueError(f'filter.{name}: must be a list, given "{values}"; put it into one')
    return values


def _has_any(cells: pl.Series, values: ExternalIds) -> pl.Series:
    """(N,) Boolean: which cells are, or as lists hold, one of the values."""
    wanted = pl.Series("cell", [str(value) for value in values], dtype=pl.String).unique()
    if cells.dtype != pl.List:
        return cells.cast(pl.String).is_in(wanted.implode()).fill_null(False)
    frame = pl.DataFrame({"cell": cells.cast(pl.List(pl.String))}).with_row_index("row")
    rows = frame.explode("cell").join(wanted.to_frame(), on="cell", how="semi")["row"]
    return frame["row"].is_in(rows.unique().implode())
