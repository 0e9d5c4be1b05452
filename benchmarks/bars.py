"""What a benchmark's result must show: a bar is met by the worst of the values found."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from tables import build_table

Found = list[tuple[float, str]]  # value, where


@dataclass(frozen=True)
class Bar:
    text: str
    bound: str
    measured: float | None  # the worst of all sizes; None where a contestant did not run
    where: str
    met: bool | None


def at_most(text: str, bound: float, found: Found) -> Bar:
    if not found:
        return Bar(text, f"<= {bound:g}", None, "", None)
    value, where = max(found)
    return Bar(text, f"<= {bound:g}", value, where, value <= bound)


def at_least(text: str, bound: float, found: Found) -> Bar:
    if not found:
        return Bar(text, f">= {bound:g}", None, "", None)
    value, where = min(found)
    return Bar(text, f">= {bound:g}", value, where, value >= bound)


def without_bound(text: str, found: Found) -> Bar:
    """Only said: the smallest."""
    value, where = min(found, default=(None, ""))
    return Bar(text, "", value, where, None)


def bar_table(bars: list[Bar]) -> Table:
    columns = ("bar", "bound", "measured", "at", "")
    table = build_table("bars", *columns, text_columns=("bar", "at", ""))
    marks = {True: "[green]met", False: "[red]missed", None: ""}
    for bar in bars:
        measured = "" if bar.measured is None else f"{bar.measured:.3g}"
        mark = "not measured" if bar.measured is None else marks[bar.met]
        table.add_row(bar.text, bar.bound, measured, bar.where, mark)
    return table
