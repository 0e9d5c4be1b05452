"""The rows of a result of bench_negatives.py, and what they must show."""

from __future__ import annotations

from dataclasses import dataclass

from bars import Bar, Found, at_least, without_bound


@dataclass(frozen=True)
class Row:
    """Times of one contestant, in nanoseconds a draw."""

    section: str  # the distribution; "shared" is unigram with one set of items for all rows
    num_items: int
    num_rows: int
    num_negatives: int
    what: str
    num_draws: int  # in one call
    rounds: int
    p20_ns: float
    p50_ns: float
    p80_ns: float
    draws_per_s: int  # by the median


def medians(rows: list[Row], section: str) -> dict[int, dict[str, float]]:
    """Number of items -> contestant -> ns a draw."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.section == section:
            found.setdefault(row.num_items, {})[row.what] = row.p50_ns
    return found


def compute_bars(rows: list[Row], num_items: int) -> list[Bar]:
    """The bars stand at `num_items`."""

    def ratio(section: str, above: str, below: str) -> Found:
        at = medians(rows, section).get(num_items, {})
        if above not in at or below not in at:
            return []
        return [(at[above] / at[below], f"{num_items} items")]

    ours = "ours, excluding"
    return [
        at_least(
            "unigram: multinomial / ours, excluding", 8, ratio("unigram", "multinomial", ours)
        ),
        at_least(
            "unigram: numpy choice / ours, excluding", 10, ratio("unigram", "numpy choice", ours)
        ),
        at_least("uniform: randint / ours", 2, ratio("uniform", "randint", "ours")),
        without_bound(
            "unigram: multinomial per row / ours, excluding",
            ratio("unigram", "multinomial per row", ours),
        ),
    ]
