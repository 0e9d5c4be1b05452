"""Tables and plot of a result of bench_infonce.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from bars import Bar, bar_table
from infonce_bars import Results
from rich.console import Console
from rich.table import Table
from tables import build_table, error_cell, name_axes

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {
    "ours": "tab:red",
    "ours, every option": "tab:pink",
    "linear_cross_entropy": "tab:blue",
    "eager": "tab:orange",
    "torch.compile": "tab:green",
    "chunked": "tab:purple",
    "products": "black",
}


def print_tables(console: Console, results: Results, bars: list[Bar]) -> None:
    for section in dict.fromkeys(row.section for row in results.rows):
        console.print(_time_table(section, results))
    if results.memory:
        console.print(_memory_table(results))
    console.print(bar_table(bars))


def _time_table(section: str, results: Results) -> Table:
    columns = ("N", "D", "what", "rounds", "p20 ms", "p50 ms", "p80 ms", "ratio")
    table = build_table(section, *columns, "loss err", "grad err", text_columns=("what",))
    last = None
    for row in results.rows:
        if row.section != section:
            continue
        if last not in (None, (row.n, row.d)):
            table.add_section()
        last = (row.n, row.d)
        what = row.what if row.block is None else f"{row.what}, block {row.block}"
        times = [f"{time:.1f}" for time in (row.p20_ms, row.p50_ms, row.p80_ms)]
        errors = [error_cell(row.loss_error), error_cell(row.gradient_error)]
        cells = (row.n, row.d, what, row.rounds, *times, f"{row.ratio:.2f}", *errors)
        table.add_row(*map(str, cells))
    return table


def _memory_table(results: Results) -> Table:
    columns = ("section", "N", "D", "what", "extra MiB", "total MiB")
    table = build_table("memory", *columns, text_columns=("section", "what"))
    for row in results.memory:
        sizes = (f"{row.extra_mib:.1f}", f"{row.total_mib:.1f}")
        table.add_row(row.section, str(row.n), str(row.d), row.what, *sizes)
    return table


# --- the plot -----------------------------------------------------------------------------------


def save_plot(path: Path, results: Results, title: str) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    figure.suptitle(title)
    _plot_times(axes[0, 0], results, "one-direction", "N")
    _plot_times(axes[0, 1], results, "one-direction", "D")
    _plot_times(axes[1, 0], results, "symmetric", "N")
    _plot_times(axes[1, 1], results, "forward", "N")
    _plot_growth(axes[0, 2], results)
    _plot_memory(axes[1, 2], results)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_times(axis: Any, results: Results, section: str, against: str) -> None:
    """Medians over one side of the sizes, at the value of the other that has most of them."""
    times = results.times(section)
    side = "ND".index(against)
    others = [size[1 - side] for size in times]
    held = max(sorted(set(others), reverse=True), key=others.count, default=None)
    if held is None:
        axis.set_axis_off()
        return
    lines: dict[str, list[tuple[int, float]]] = {}
    for size, medians in sorted(times.items()):
        if size[1 - side] == held:
            for what, median in medians.items():
                lines.setdefault(what, []).append((size[side], median))
    for what, points in lines.items():
        style = "--" if what == "products" else "-"
        axis.loglog(*zip(*points, strict=True), style, marker="o", label=what, color=COLORS[what])
    name_axes(
        axis, f"{section}, {'DN'[side]} = {held}", against, "ms", sorted({s[side] for s in times})
    )


def _plot_growth(axis: Any, results: Results) -> None:
    """Our time and memory, relative to the smallest size."""
    lines, exponents = results.growth(), results.exponents()
    if not lines:
        axis.set_axis_off()
        return
    for name, line in lines.items():
        x, y = zip(*line, strict=True)
        style = "-" if name.startswith("time") else "--"
        color = "tab:red" if name.endswith("N") else "tab:blue"
        label = f"{name}: exponent {exponents[name]:.2f}"
        points = [v / x[0] for v in x], [v / y[0] for v in y]
        axis.loglog(*points, style, marker="o", color=color, label=label)
    name_axes(axis, "growth of ours", "growth of N or D", "growth of time or memory", [1, 2, 4, 8])


def _plot_memory(axis: Any, results: Results) -> None:
    rows = [row for row in results.memory if row.section != "scaling"]
    if not rows:
        axis.set_axis_off()
        return
    names = [f"{row.what}\n{row.section}" for row in rows]
    bars = axis.barh(
        names, [max(row.extra_mib, 0.1) for row in rows], color=[COLORS[row.what] for row in rows]
    )
    axis.bar_label(bars, [f"{row.extra_mib:.0f}" for row in rows], padding=3)
    axis.set_xscale("log")
    axis.margins(x=0.1)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set_title(f"MiB beyond inputs and gradients, N = {rows[0].n}, D = {rows[0].d}")
