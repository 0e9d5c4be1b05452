"""What a result of bench_scale.py must show."""

from __future__ import annotations

from bars import Bar, Found, at_least, at_most, without_bound
from scale_ranks import RanksRow
from scale_sizes import SizeRow

LARGE = 1_000_000  # items; from here on the caches hold next to nothing of the table
BAR_LOAD = "arithmetic"  # of the bar on two processes


def compute_bars(sizes: list[SizeRow], ranks: list[RanksRow]) -> list[Bar]:
    return [
        at_most(
            f"step less bare gather and scatter from {LARGE} items on, largest / smallest",
            1.15,
            _spreads([row for row in sizes if row.num_items >= LARGE], "rest_ms"),
        ),
        at_most(
            "peak memory less table and optimizer, largest / smallest",
            1.15,
            _spreads(sizes, "rest_mib"),
        ),
        at_least(
            f"{BAR_LOAD}: wall time of one process / two, where the machine was quiet",
            1.4,
            _ratios([row for row in ranks if row.load == BAR_LOAD and row.is_quiet]),
        ),
        without_bound(
            "other loads: wall time of one process / two, where the machine was quiet",
            _ratios([row for row in ranks if row.load != BAR_LOAD and row.is_quiet]),
        ),
        *(
            without_bound(
                f"{load}: CPU time of one process / the busier of two",
                _cpu_ratios([row for row in ranks if row.load == load]),
            )
            for load in dict.fromkeys(row.load for row in ranks)
        ),
    ]


def _spreads(rows: list[SizeRow], of: str) -> Found:
    """The largest over the smallest over the tables of a load, where there are two at least."""
    found: Found = []
    for load in dict.fromkeys(row.load for row in rows):
        values = [getattr(row, of) for row in rows if row.load == load]
        if len(values) > 1:
            found.append((max(values) / min(values), load))
    return found


def _ratios(rows: list[RanksRow]) -> Found:
    return [(row.ratio, f"{row.load}, {row.num_items} items") for row in rows]


def _cpu_ratios(rows: list[RanksRow]) -> Found:
    """What the ratio comes to where no rank waits."""
    return [(row.one_cpu_ms / row.two_cpu_ms, f"{row.num_items} items") for row in rows]
