"""Negatives drawn by integers alone, so that every device gives the same (csrc/negatives)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchrec_pt.data.jagged import Jagged

Distribution = Literal["uniform", "log_uniform", "unigram"]

_MOST_TRIES_PER_NEGATIVE = 64  # of unique sampling, before it takes the next best
_FEWEST_TRIES = 4096


class SampledNegatives(NamedTuple):
    """Attributes:
    ids: (R, M) int64 items of each row, or (M,) shared by all rows.
    log_q: of the same shape, float32; the log of how often the item is expected among the M.
    """

    ids: Tensor
    log_q: Tensor


class NegativeSampler:
    """Draws items to serve as negatives.

    A row's negatives depend on (seed, step, global row) alone: not on the device, the number of
    ranks or threads, or which rows are drawn together. Random words come from Philox4x32-10
    (Salmon et al. 2011), items from an integer alias table (Vose 1991).

    Args:
        num_items: n; items are 0 … n − 1; below 2^31.
        num_negatives: M, of a row or shared by all rows.
        distribution: "uniform"; "log_uniform", P(i) = log((i + 2) / (i + 1)) / log(n + 1), for
            items in descending frequency; "unigram", P(i) ∝ counts_i^alpha (Mikolov et al. 2013,
            section 2.2). An item that was never counted is never drawn.
        counts: (n,) training counts, with "unigram".
        alpha: of "unigram"; 0 is uniform over the items that were counted.
        seed: in [0, 2^32).
    Raises:
        ValueError: an argument outside these.
    """

    def __init__(
        self,
        num_items: int,
        num_negatives: int,
        *,
        distribution: Distribution = "uniform",
        counts: Tensor | None = None,
        alpha: float = 0.75,
        seed: int = 0,
    ) -> None:
        if not 1 <= num_items < 2**31:
            raise ValueError(f"negatives: num_items must be in [1, 2^31), got {num_items}")
        if num_negatives < 0:
            raise ValueError(f"negatives: num_negatives must be 0 or more, got {num_negatives}")
        if (distribution == "unigram") != (counts is not None):
            raise ValueError(
                'negatives: counts and distribution "unigram" go together, '
                f'got "{distribution}" {"without" if counts is None else "with"} counts'
            )
        if counts is not None and counts.shape != (num_items,):
            raise ValueError(
                f"negatives: counts must have shape ({num_items},), got {tuple(counts.shape)}"
            )
        self.num_items = num_items
        self.num_negatives = num_negatives
        self.seed = seed
        self._tables: dict[torch.device, _Tables] = {}
        cpu = torch.device("cpu")
        if counts is not None:
            self._tables[cpu] = _build_tables(_powers(counts, alpha))
        elif distribution == "log_uniform":
            self._tables[cpu] = _build_tables(
                torch.arange(1, num_items + 1).double().pow(-1).log1p()
            )
        elif distribution == "uniform":
            self._tables[cpu] = _Tables(None, None, num_items, num_items)
        else:
            raise ValueError(
                'negatives: distribution must be "uniform", "log_uniform" or "unigram", '
                f'got "{distribution}"'
            )
        self._draw(torch.arange(0), 0, step=0)  # checks num_items and seed

    def sample(
        self,
        rows: int | Tensor,
        *,
        step: int,
        exclude: Jagged | None = None,
        device: torch.device | str | None = None,
    ) -> SampledNegatives:
        """(R, M) negatives, with replacement.

        Args:
            rows: (R,) int64 numbers of the rows in the global batch, in [0, 2^32); a number R
                stands for the rows 0 … R − 1.
            step: in [0, 2^32).
            exclude: R rows of items that a row is not given, each strictly ascending
                (`Jagged.to_sets`). log_q is that of the items left.
            device: default: that of rows, or the CPU.
        Raises:
            ValueError: exclude does not fit, or a row excludes every item. On CUDA what stands in
                rows and exclude is checked by device assertions.
        """
        if isinstance(rows, int):
            rows = torch.arange(rows)
        if device is not None:
            rows = rows.to(device)
        return self._draw(rows, self.num_negatives, step=step, exclude=exclude)

    def sample_shared(
        self,
        *,
        step: int,
        exclude: Tensor | None = None,
        unique: bool = False,
        device: torch.device | str = "cpu",
    ) -> SampledNegatives:
        """(M,) negatives for all rows; on every rank the same.

        Args:
            step: in [0, 2^32).
            exclude: (T,) int64 items that are not drawn, strictly ascending.
            unique: draw until M distinct items have come up, each in the place where it came up
                first. log_q is that of the draws it took, T of them: log(1 − (1 − q)^T), as in
                candidate sampling. Waits for the device. Where max(64 M, 4096) draws did not
                suffice, the items not drawn with the lowest numbers fill up; these are certain,
                as are all where M is the number of items that can be drawn: log_q = 0.
        Raises:
            ValueError: exclude does not fit, or fewer than M items can be drawn.
        """
        row = torch.zeros(1, dtype=torch.int64, device=device)
        excluded = None
        if exclude is not None:
            excluded = Jagged(exclude, torch.tensor([0, len(exclude)], device=device))
        if unique:
            return self._draw_unique(row, step, excluded)
        ids, log_q = self._draw(row, self.num_negatives, step=step, exclude=excluded)
        return SampledNegatives(ids[0], log_q[0])

    def log_q(self, ids: Tensor) -> Tensor:
        """The log of how often each item is expected among M draws that exclude nothing.

        −inf for an item that is never drawn; like `ids` in shape, float32.
        """
        share = self._mass(ids).double() / self._total_mass
        return share.mul(self.num_negatives).log().float()

    def _tables_on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _draw(
        self, rows: Tensor, num_draws: int, *, step: int, exclude: Jagged | None = None
    ) -> SampledNegatives:
        tables = self._tables_on(rows.device)
        ids, log_q = torch.ops.torchrec_pt.sample_negatives(
            rows,
            num_draws,
            self.num_items,
            self.seed,
            step,
            tables.columns,
            tables.mass,
            None if exclude is None else exclude.values.contiguous(),
            None if exclude is None else exclude.offsets.contiguous(),
        )
        return SampledNegatives(ids, log_q.expand_as(ids))

    def _draw_unique(self, row: Tensor, step: int, exclude: Jagged | None) -> SampledNegatives:
        self._draw(row, 0, step=step, exclude=exclude)  # checks exclude
        num_wanted = self.num_negatives
        left_out = row[:0] if exclude is None else exclude.values
        num_possible = self._tables_on(row.device).num_possible
        num_possible -= int((self._mass(left_out) > 0).sum())
        if num_possible < num_wanted:
            raise ValueError(
                f"negatives: {num_wanted} unique negatives are asked of the {num_possible} items "
                "that can be drawn; lower num_negatives"
            )
        most_tries = max(_MOST_TRIES_PER_NEGATIVE * num_wanted, _FEWEST_TRIES)
        num_tries, ids, first = 0, row[:0], row[:0]
        while len(ids) < num_wanted and num_tries < most_tries:
            num_tries = min(max(2 * num_tries, 2 * num_wanted), most_tries)
            draws = self._draw(row, num_tries, step=step, exclude=exclude).ids[0]
            ids, first = _in_order_of_appearance(draws)
        num_drawn = min(len(ids), num_wanted)
        if num_drawn == num_wanted:
            ids = ids[:num_wanted]
            num_tries = int(first[num_wanted - 1]) + 1 if num_wanted else 0
        else:
            is_left = self._mass(torch.arange(self.num_items, device=row.device)) > 0
            is_left[ids] = False
            is_left[left_out] = False
            ids = torch.cat([ids, is_left.nonzero()[: num_wanted - len(ids), 0]])
        if num_possible == num_wanted:
            num_drawn = 0
        share = self._mass(ids).double() / (self._total_mass - self._mass(left_out).sum())
        log_q = torch.log(-torch.expm1(num_tries * torch.log1p(-share))).float()
        log_q[num_drawn:] = 0
        return SampledNegatives(ids, log_q)

    @property
    def _total_mass(self) -> int:
        has_mass = self._tables[torch.device("cpu")].mass is not None
        return self.num_items << 32 if has_mass else self.num_items

    def _mass(self, ids: Tensor) -> Tensor:
        """int64; an item's probability is this over the total."""
        mass = self._tables_on(ids.device).mass
        return torch.ones_like(ids) if mass is None else mass[ids]


class _Tables(NamedTuple):
    """A distribution on one device; `columns` and `mass` as in csrc/negatives/negatives.h."""

    columns: Tensor | None
    mass: Tensor | None
    num_items: int
    num_possible: int

    def to(self, device: torch.device) -> _Tables:
        if self.columns is None or self.mass is None:
            return self
        return self._replace(columns=self.columns.to(device), mass=self.mass.to(device))


def _build_tables(weights: Tensor) -> _Tables:
    # Two machines' libraries may differ in the last bit of a power or a logarithm. In float32 that
    # shows for one value in about 10^8.
    columns, mass = torch.ops.torchrec_pt.alias_table(weights.float().double())
    return _Tables(columns, mass, len(mass), int((mass > 0).sum()))


def _powers(counts: Tensor, alpha: float) -> Tensor:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"negatives: alpha must be finite and 0 or more, got {alpha}")
    counts = counts.cpu().double()
    is_bad = ~(counts.isfinite() & (counts >= 0))
    if is_bad.any():
        item = int(is_bad.nonzero()[0])
        raise ValueError(
            f"negatives: counts must be finite and 0 or more, got {counts[item]:g} for item {item}"
        )
    return torch.where(counts == 0, 0, counts.pow(alpha))


def _in_order_of_appearance(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids, and where each stands first; both in that order."""
    distinct, inverse = ids.unique(return_inverse=True)
    place = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(distinct, len(ids)).scatter_reduce(0, inverse, place, "amin")
    first, order = first.sort()
    return distinct[order], first


# --- what torch.compile needs -------------------------------------------------------------------


@torch.library.register_fake("torchrec_pt::philox")
def _fake_philox(counters: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(counters)


@torch.library.register_fake("torchrec_pt::alias_table")
def _fake_alias_table(weights: Tensor) -> tuple[Tensor, Tensor]:
    num_items = weights.shape[0]
    return (
        weights.new_empty((num_items, 4), dtype=torch.int32),
        weights.new_empty((num_items,), dtype=torch.int64),
    )


@torch.library.register_fake("torchrec_pt::sample_negatives")
def _fake_sample_negatives(
    rows: Tensor, num_draws: int, num_items: int, seed: int, step: int, columns: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    num_logs = 1 if columns is None else num_draws
    return (
        rows.new_empty((rows.shape[0], num_draws)),
        rows.new_empty((rows.shape[0], num_logs), dtype=torch.float32),
    )
