"""The rows of a result of bench_infonce.py, and what they must show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from bars import Bar, Found, at_least, at_most


@dataclass(frozen=True)
class Row:
    """Times of one contestant, in milliseconds."""

    section: str  # "one-direction" and "symmetric" with gradients, "forward", "scaling"
    n: int
    d: int
    what: str
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio: float  # of p50 to that of the bare products
    loss_error: float | None  # not of the products
    gradient_error: float | None
    block: int | None  # of the products


@dataclass(frozen=True)
class MemoryRow:
    section: str  # "one-direction", "symmetric", "scaling"
    n: int
    d: int
    what: str
    extra_mib: float  # beyond inputs and gradients
    total_mib: float  # with them


@dataclass(frozen=True)
class Results:
    rows: list[Row]
    memory: list[MemoryRow]

    def times(self, section: str) -> dict[tuple[int, int], dict[str, float]]:
        """(N, D) -> contestant -> median."""
        found: dict[tuple[int, int], dict[str, float]] = {}
        for row in self.rows:
            if row.section == section:
                found.setdefault((row.n, row.d), {})[row.what] = row.p50_ms
        return found

    def growth(self) -> dict[str, Line]:
        """Our time and total memory against N and against D, of the section "scaling"."""
        times = [(row.n, row.d, row.p50_ms) for row in self.rows if _is_of_growth(row)]
        memory = [(row.n, row.d, row.total_mib) for row in self.memory if _is_of_growth(row)]
        lines = {
            "time in N": _line([(n, d, y) for n, d, y in times]),
            "time in D": _line([(d, n, y) for n, d, y in times]),
            "memory in N": _line([(n, d, y) for n, d, y in memory]),
            "memory in D": _line([(d, n, y) for n, d, y in memory]),
        }
        return {name: line for name, line in lines.items() if len(line) > 1}

    def exponents(self) -> dict[str, float]:
        """Slopes of log y over log x."""
        return {name: _slope(np.log(np.array(line))) for name, line in self.growth().items()}


Line = list[tuple[int, float]]


def _slope(points: npt.NDArray[np.float64]) -> float:
    return round(float(np.polyfit(points[:, 0], points[:, 1], 1)[0]), 3)


def _is_of_growth(row: Row | MemoryRow) -> bool:
    return row.section == "scaling" and row.what == "ours"


def _line(points: list[tuple[int, int, float]]) -> Line:
    """The (x, y) of (x, other, y), at the value of `other` that has most of them."""
    others = [other for _, other, _ in points]
    held = max(others, key=others.count, default=None)
    return sorted((x, y) for x, other, y in points if other == held)


@dataclass(frozen=True)
class BarSizes:
    """Where the bars stand."""

    products: tuple[int, int] = (8192, 128)
    memory: tuple[int, int] = (16384, 128)
    large: int = 8192  # the least N where the symmetric loss is compared to the others


def compute_bars(results: Results, sizes: BarSizes) -> list[Bar]:
    return [
        *_one_direction_bars(results, sizes),
        *_symmetric_bars(results, sizes),
        *_memory_bars(results, sizes),
        *_error_bars(results),
        *_scaling_bars(results),
    ]


def _one_direction_bars(results: Results, sizes: BarSizes) -> Iterator[Bar]:
    ratios = _ratios(results, "one-direction")
    for peer in ("linear_cross_entropy", "eager", "torch.compile"):
        yield at_most(f"one direction: ours / {peer}, every N and D", 1.05, ratios("ours", peer))
    yield at_most(
        f"one direction: ours / its three products, {_name(sizes.products)}",
        1.15,
        ratios("ours", "products", lambda n, d: (n, d) == sizes.products),
    )
    yield at_most(
        "one direction: ours with every option / ours, every N and D",
        1.25,
        ratios("ours, every option", "ours"),
    )


def _symmetric_bars(results: Results, sizes: BarSizes) -> Iterator[Bar]:
    ratios = _ratios(results, "symmetric")

    def is_large(n: int, d: int) -> bool:
        return n >= sizes.large and d <= 128

    where = f"every N >= {sizes.large}, D <= 128"
    yield at_most(
        f"symmetric: ours / its four products, {_name(sizes.products)}",
        1.2,
        ratios("ours", "products", lambda n, d: (n, d) == sizes.products),
    )
    yield at_least(f"symmetric: eager / ours, {where}", 2, ratios("eager", "ours", is_large))
    yield at_least(
        f"symmetric: two linear_cross_entropy / ours, {where}",
        1.4,
        ratios("linear_cross_entropy", "ours", is_large),
    )


def _memory_bars(results: Results, sizes: BarSizes) -> Iterator[Bar]:
    for direction in ("one-direction", "symmetric"):
        found = [
            (row.extra_mib, _name((row.n, row.d)))
            for row in results.memory
            if (row.section, row.what, (row.n, row.d)) == (direction, "ours", sizes.memory)
        ]
        text = f"{direction}: MiB beyond inputs and gradients, {_name(sizes.memory)}"
        yield at_most(text, 32, found)


def _error_bars(results: Results) -> Iterator[Bar]:
    ours = [row for row in results.rows if row.what.startswith("ours")]
    for name, bound in (("loss", 1e-5), ("gradient", 1e-4)):
        values = [(getattr(row, f"{name}_error"), row) for row in ours]
        found = [(v, f"{row.section}, {row.what}, D {row.d}") for v, row in values if v is not None]
        yield at_most(f"relative error of our {name}", bound, found)


def _scaling_bars(results: Results) -> Iterator[Bar]:
    """A part that does not grow makes an exponent smaller, so only its upper side is a bar."""
    exponents = results.exponents()
    for name, bound in {
        "time in N": 2.1,
        "time in D": 1.1,
        "memory in N": 1.1,
        "memory in D": 1.1,
    }.items():
        found = [(exponents[name], "")] if name in exponents else []
        yield at_most(f"exponent of our {name}", bound, found)


def _ratios(results: Results, section: str) -> Callable[..., Found]:
    times = results.times(section)

    def ratios(
        above: str, below: str, is_wanted: Callable[[int, int], bool] = lambda n, d: True
    ) -> Found:
        return [
            (medians[above] / medians[below], _name(size))
            for size, medians in times.items()
            if above in medians and below in medians and is_wanted(*size)
        ]

    return ratios


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
