"""Tables and plot of a result of bench_sampled_softmax.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from bars import Bar, bar_table
from rich.console import Console
from rich.table import Table
from sampled_softmax_bars import Results
from tables import build_table, error_cell, name_axes

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {
    "ours": "tab:red",
    "eager": "tab:orange",
    "eager, distinct items": "tab:brown",
    "index_select": "tab:blue",
    "compiled after the gather": "tab:olive",
    "torch.compile": "tab:green",
}


def print_tables(console: Console, results: Results, bars: list[Bar]) -> None:
    for section in dict.fromkeys(row.section for row in results.rows):
        console.print(_time_table(section, results))
    if results.memory:
        console.print(_memory_table(results))
    console.print(bar_table(bars))


def _time_table(section: str, results: Results) -> Table:
    columns = ("B", "M", "D", "items", "what", "rounds", "p20 ms", "p50 ms", "p80 ms", "/ ours")
    errors = ("loss err", "query err", "table err")
    table = build_table(section, *columns, *errors, text_columns=("what",))
    last = None
    for row in results.rows:
        if row.section != section:
            continue
        if last not in (None, row.size):
            table.add_section()
        last = row.size
        size = (last.num_rows, last.num_negatives, last.dim, last.num_items)
        times = [f"{time:.1f}" for time in (row.p20_ms, row.p50_ms, row.p80_ms)]
        found = [error_cell(e) for e in (row.loss_error, row.query_error, row.table_error)]
        table.add_row(*map(str, (*size, row.what, row.rounds, *times, f"{row.ratio:.2f}", *found)))
    return table


def _memory_table(results: Results) -> Table:
    columns = ("section", "B x M x D", "what", "extra MiB", "total MiB")
    table = build_table("memory", *columns, text_columns=("section", "B x M x D", "what"))
    for row in results.memory:
        sizes = (f"{row.extra_mib:.1f}", f"{row.total_mib:.1f}")
        table.add_row(row.section, str(row.size), row.what, *sizes)
    return table


# --- the plot -----------------------------------------------------------------------------------


def save_plot(path: Path, results: Results, title: str) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(18, 9), layout="constrained")
    figure.suptitle(title)
    _plot_lines(axes[0, 0], results, "per row", ("num_negatives", "M"), ("dim", "D"))
    _plot_lines(axes[0, 1], results, "per row", ("dim", "D"), ("num_negatives", "M"))
    _plot_lines(axes[1, 0], results, "shared", ("num_negatives", "M"), ("dim", "D"))
    _plot_times(axes[1, 1], results, "dense gradient")
    _plot_times(axes[1, 2], results, "bfloat16")
    _plot_memory(axes[0, 2], results)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_lines(
    axis: Any, results: Results, section: str, against: tuple[str, str], other: tuple[str, str]
) -> None:
    """Medians over one side of the sizes, at the value of the other that has most of them."""
    times = results.times(section)
    others = [getattr(size, other[0]) for size in times]
    if not others:
        axis.set_axis_off()
        return
    held = max(sorted(set(others)), key=others.count)
    lines: dict[str, list[tuple[int, float]]] = {}
    for size in sorted(times, key=lambda size: getattr(size, against[0])):
        if getattr(size, other[0]) == held:
            for what, median in times[size].items():
                lines.setdefault(what, []).append((getattr(size, against[0]), median))
    for what, points in lines.items():
        axis.loglog(*zip(*points, strict=True), marker="o", label=what, color=COLORS[what])
    first = next(iter(times))
    title = f"{section}, B = {first.num_rows}, {other[1]} = {held}, {first.num_items} items"
    name_axes(
        axis, title, against[1], "ms", sorted({x for line in lines.values() for x, _ in line})
    )


def _plot_times(axis: Any, results: Results, section: str) -> None:
    """Medians at the section's first size."""
    times = results.times(section)
    size = next(iter(times), None)
    if size is None:
        axis.set_axis_off()
        return
    _plot_bars(axis, times[size], "{:.0f}")
    axis.set_title(f"{section}, ms\n{size}")


def _plot_memory(axis: Any, results: Results) -> None:
    if not results.memory:
        axis.set_axis_off()
        return
    _plot_bars(axis, {row.what: row.extra_mib for row in results.memory}, "{:.1f}")
    axis.set_title(f"MiB beyond inputs and gradients\n{results.memory[0].size}")


def _plot_bars(axis: Any, values: dict[str, float], label: str) -> None:
    bars = axis.barh(list(values), list(values.values()), color=[COLORS[what] for what in values])
    axis.bar_label(bars, [label.format(value) for value in values.values()], padding=3)
    axis.margins(x=0.16)
    axis.invert_yaxis()
