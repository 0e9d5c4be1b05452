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
            f"step less bare gather and scatter, above {LARGE} items / there",
            1.15,
            _growth(sizes),
        ),
        at_most(
            "peak memory less table and optimizer, largest / smallest",
            1.15,
            _spread_of_memory(sizes),
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


def _growth(rows: list[SizeRow]) -> Found:
    """Below 1 where the bare gather and scatter grow faster than the step."""
    at_large = [row.rest_ms for row in rows if row.num_items == LARGE]
    return [
        (row.rest_ms / at_large[0], f"{row.num_items} items")
        for row in rows
        if at_large and row.num_items > LARGE
    ]


def _spread_of_memory(rows: list[SizeRow]) -> Found:
    rests = [row.rest_mib for row in rows]
    return [(max(rests) / min(rests), "all sizes")] if len(rests) > 1 else []


def _ratios(rows: list[RanksRow]) -> Found:
    return [(row.ratio, f"{row.load}, {row.num_items} items") for row in rows]


def _cpu_ratios(rows: list[RanksRow]) -> Found:
    """What the ratio comes to where no rank waits."""
    return [(row.one_cpu_ms / row.two_cpu_ms, f"{row.num_items} items") for row in rows]
