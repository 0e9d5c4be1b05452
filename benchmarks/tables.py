"""What the tables and plots of the benchmarks share."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def build_table(title: str, *columns: str, text_columns: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in text_columns else "right")
    return table


def error_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def name_axes(axis: Any, title: str, x_name: str, y_name: str, ticks: list[int]) -> None:
    axis.set_title(title)
    axis.set_xlabel(x_name)
    axis.set_ylabel(y_name)
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
