"""Tables and plot of a result of bench_negatives.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from bars import Bar, bar_table
from negatives_bars import Row, medians
from rich.console import Console
from rich.table import Table
from tables import build_table, name_axes

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {
    "ours": "tab:red",
    "ours, excluding": "tab:pink",
    "ours, unique": "tab:pink",
    "multinomial": "tab:blue",
    "multinomial per row": "tab:cyan",
    "multinomial, no replacement": "tab:cyan",
}


def print_tables(console: Console, rows: list[Row], bars: list[Bar]) -> None:
    for section in dict.fromkeys(row.section for row in rows):
        console.print(_time_table(section, [row for row in rows if row.section == section]))
    console.print(bar_table(bars))


def _time_table(section: str, rows: list[Row]) -> Table:
    columns = ("items", "rows x negatives", "what", "draws", "rounds")
    quantiles = ("p20 ns", "p50 ns", "p80 ns", "million draws/s")
    table = build_table(section, *columns, *quantiles, text_columns=("what",))
    last = None
    for row in rows:
        if last not in (None, row.num_items):
            table.add_section()
        last = row.num_items
        times = [f"{time:.2f}" for time in (row.p20_ns, row.p50_ns, row.p80_ns)]
        shape = f"{row.num_rows}x{row.num_negatives}"
        speed = f"{row.draws_per_s / 1e6:.2f}"
        cells = (row.num_items, shape, row.what, row.num_draws, row.rounds, *times, speed)
        table.add_row(*map(str, cells))
    return table


def save_plot(path: Path, rows: list[Row], title: str) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    figure.suptitle(title)
    _plot_lines(axes[0, 0], rows, "unigram")
    _plot_bars(axes[0, 1], rows, "log_uniform")
    _plot_bars(axes[1, 0], rows, "uniform")
    _plot_bars(axes[1, 1], rows, "shared")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_lines(axis: Any, rows: list[Row], section: str) -> None:
    """Medians over the number of items."""
    found = medians(rows, section)
    if not found:
        axis.set_axis_off()
        return
    lines: dict[str, list[tuple[int, float]]] = {}
    for num_items, of_size in sorted(found.items()):
        for what, median in of_size.items():
            lines.setdefault(what, []).append((num_items, median))
    for what, points in lines.items():
        color = COLORS.get(what, "tab:gray")
        axis.loglog(*zip(*points, strict=True), marker="o", label=what, color=color)
    name_axes(axis, section, "items", "ns per draw", sorted(found))


def _plot_bars(axis: Any, rows: list[Row], section: str) -> None:
    """Medians at the largest number of items."""
    found = medians(rows, section)
    if not found:
        axis.set_axis_off()
        return
    num_items = max(found)
    names, times = list(found[num_items]), list(found[num_items].values())
    bars = axis.barh(names, times, color=[COLORS.get(name, "tab:gray") for name in names])
    axis.bar_label(bars, [f"{time:.1f}" for time in times], padding=3)
    axis.margins(x=0.16)
    axis.invert_yaxis()
    axis.set_title(f"{section}, {num_items} items: ns per draw")
