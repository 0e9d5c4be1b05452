"""Tables and plot of a result of bench_scale.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from bars import Bar, bar_table
from rich.console import Console
from rich.table import Table
from scale_ranks import RanksRow
from scale_sizes import SizeRow
from tables import build_table, name_axes

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"lookups": "tab:red", "arithmetic": "tab:blue"}


def print_tables(
    console: Console, sizes: list[SizeRow], ranks: list[RanksRow], bars: list[Bar]
) -> None:
    if sizes:
        console.print(_time_table(sizes))
        console.print(_memory_table(sizes))
    if ranks:
        console.print(_ranks_table(ranks))
    console.print(bar_table(bars))


def _time_table(rows: list[SizeRow]) -> Table:
    columns = ("load", "items", "batch", "rows", "step ms", "p20–p80", "bare ms", "p20–p80")
    table = build_table(
        "CPU time of a step", *columns, "less bare", "samples/s", text_columns=("load",)
    )
    for row in rows:
        table.add_row(
            *map(str, (row.load, row.num_items, row.batch_size, row.num_rows)),
            f"{row.step_p50_ms:.1f}",
            f"{row.step_p20_ms:.1f}–{row.step_p80_ms:.1f}",
            f"{row.bare_p50_ms:.2f}",
            f"{row.bare_p20_ms:.2f}–{row.bare_p80_ms:.2f}",
            f"{row.rest_ms:.1f}",
            f"{row.samples_per_s:.0f}",
        )
    return table


def _memory_table(rows: list[SizeRow]) -> Table:
    columns = ("load", "items", "table MiB", "optimizer MiB", "peak MiB", "less both")
    table = build_table("memory and set-up", *columns, "shard s", "fill s", text_columns=("load",))
    for row in rows:
        mib = (row.table_mib, row.state_mib, row.peak_mib, row.rest_mib)
        cells = (*(f"{value:.1f}" for value in mib), str(row.shard_s), str(row.fill_s))
        table.add_row(row.load, str(row.num_items), *cells)
    return table


def _ranks_table(rows: list[RanksRow]) -> Table:
    columns = ("load", "items", "turns", "others", "one ms", "p20–p80", "two ms", "p20–p80")
    more = ("one / two", "one CPU ms", "two CPU ms", "communication", "collectives")
    table = build_table("one process and two", *columns, *more, text_columns=("load",))
    for row in rows:
        table.add_row(
            row.load,
            str(row.num_items),
            f"{row.rounds_used} of {row.rounds}{'' if row.is_quiet else ', busy'}",
            f"{row.others_share:.0%}",
            f"{row.one_p50_ms:.1f}",
            f"{row.one_p20_ms:.1f}–{row.one_p80_ms:.1f}",
            f"{row.two_p50_ms:.1f}",
            f"{row.two_p20_ms:.1f}–{row.two_p80_ms:.1f}",
            f"{row.ratio:.2f}",
            f"{row.one_cpu_ms:.1f}",
            f"{row.two_cpu_ms:.1f}",
            f"{row.communication_share:.0%}",
            f"{sum(row.collectives.values()):.0f}",
        )
    return table


# --- the plot -----------------------------------------------------------------------------------


def save_plot(path: Path, sizes: list[SizeRow], ranks: list[RanksRow], title: str) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(18, 5.5), layout="constrained")
    figure.suptitle(title)
    times = {"step_p50_ms": "step", "bare_p50_ms": "bare gather and scatter"}
    _plot_pair(axes[0], sizes, times, "CPU time of a step", "ms")
    memory = {"peak_mib": "peak", "rest_mib": "less table and optimizer"}
    _plot_pair(axes[1], sizes, memory, "memory", "MiB")
    _plot_ratios(axes[2], ranks)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_pair(
    axis: Any, rows: list[SizeRow], curves: dict[str, str], title: str, unit: str
) -> None:
    """Of each load two curves against the items; `curves`: attribute of the rows -> its name."""
    upper, lower = curves.items()
    for load, of_load in _by_load(rows).items():
        items, color = [row.num_items for row in of_load], COLORS[load]
        for (attribute, name), marker, line in ((upper, "o", "-"), (lower, ".", ":")):
            values = [getattr(row, attribute) for row in of_load]
            label = f"{load}: {name}"
            axis.loglog(items, values, marker=marker, linestyle=line, color=color, label=label)
    _name(axis, rows, title, unit)


def _plot_ratios(axis: Any, rows: list[RanksRow]) -> None:
    if not rows:
        axis.set_axis_off()
        return
    names = [f"{row.load}\n{row.num_items} items{'' if row.is_quiet else ', busy'}" for row in rows]
    bars = axis.bar(names, [row.ratio for row in rows], color=[COLORS[row.load] for row in rows])
    labels = [f"{row.ratio:.2f}\n({row.communication_share:.0%} comm.)" for row in rows]
    axis.bar_label(bars, labels, padding=3)
    axis.axhline(1.4, linestyle="--", color="gray")
    axis.margins(y=0.16)
    axis.set_title("one process on one core / two on two")


def _by_load(rows: list[SizeRow]) -> dict[str, list[SizeRow]]:
    found: dict[str, list[SizeRow]] = {}
    for row in rows:
        found.setdefault(row.load, []).append(row)
    return found


def _name(axis: Any, rows: list[SizeRow], title: str, y_name: str) -> None:
    if not rows:
        axis.set_axis_off()
        return
    name_axes(axis, title, "items", y_name, sorted({row.num_items for row in rows}))
