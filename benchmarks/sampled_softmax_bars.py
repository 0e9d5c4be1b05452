"""The rows of a result of bench_sampled_softmax.py, and what they must show."""

from __future__ import annotations

from dataclasses import dataclass

from bars import Bar, Found, at_least, at_most
from sampled_softmax_losses import Size


@dataclass(frozen=True)
class Row:
    """Times of one contestant, forward and backward, in milliseconds."""

    section: str
    size: Size
    what: str
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio: float  # of p50 to ours
    loss_error: float
    query_error: float  # of the gradient
    table_error: float


@dataclass(frozen=True)
class MemoryRow:
    section: str
    size: Size
    what: str
    extra_mib: float  # beyond inputs and gradients
    total_mib: float  # with them


@dataclass(frozen=True)
class Results:
    rows: list[Row]
    memory: list[MemoryRow]

    def times(self, section: str) -> dict[Size, dict[str, float]]:
        """Size -> contestant -> median."""
        found: dict[Size, dict[str, float]] = {}
        for row in self.rows:
            if row.section == section:
                found.setdefault(row.size, {})[row.what] = row.p50_ms
        return found


def compute_bars(results: Results, size: Size) -> list[Bar]:
    """Those of time and memory stand at `size`."""
    times = results.times("per row").get(size, {})
    memory = {
        row.what: row.extra_mib
        for row in results.memory
        if (row.section, row.size) == ("per row", size)
    }
    return [
        at_least("per row: eager / ours", 3, _ratio(times, "eager", "ours", size)),
        at_most(
            "per row: memory beyond inputs and gradients, ours / eager",
            0.05,
            _ratio(memory, "ours", "eager", size),
        ),
        at_most("relative error of our loss, float32", 1e-5, _errors(results, "loss")),
        at_most("relative error of our query gradient, float32", 1e-4, _errors(results, "query")),
        at_most("relative error of our table gradient, float32", 1e-4, _errors(results, "table")),
    ]


def _ratio(values: dict[str, float], above: str, below: str, size: Size) -> Found:
    if above not in values or below not in values:
        return []
    return [(values[above] / values[below], str(size))]


def _errors(results: Results, of: str) -> Found:
    return [
        (getattr(row, f"{of}_error"), f"{row.section}, {row.size}")
        for row in results.rows
        if row.what == "ours" and row.section != "bfloat16"
    ]
