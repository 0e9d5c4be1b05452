"""Contestants' turns at the same work on one thread, of which each says the costs; their report."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bars import Bar, bar_table
from conditions import build_parser, default_out, write_json
from contestants import Contestant
from measuring import quantiles, rotated
from rich.console import Console
from rich.table import Table
from tables import build_table

Entrant = tuple[Contestant, str]  # a program, and the word that asks it for a turn


def turns_parser(doc: str | None, section: str, rounds: int) -> ArgumentParser:
    parser = build_parser(doc, (section,), rounds_help="turns of each that count")
    parser.set_defaults(rounds=rounds, device="cpu")
    return parser


def parsed(parser: ArgumentParser, name: str) -> Namespace:
    """Of one thread on the CPU, with results by `name` unless it is a quick run."""
    arguments = parser.parse_args()
    if arguments.device != "cpu" or arguments.threads != 1:
        parser.error("--device, --threads: this benchmark is of one thread on the CPU")
    if arguments.out is None and not arguments.quick:
        arguments.out = default_out(name)
    torch.set_num_threads(1)
    return arguments


@dataclass(frozen=True)
class Row:
    name: str
    num: int  # of what a turn goes through, such as users
    rounds: int
    cpu_p20_s: float
    cpu_p50_s: float
    cpu_p80_s: float
    wall_p50_s: float
    per_s: float  # of CPU time, the median
    peak_mib: float  # the largest of all turns, as the next
    extra_mib: float  # over the resident size before


def take_turns(entrants: Mapping[str, Entrant], rounds: int) -> list[Row]:
    """By name; after a turn each that does not count. Then the contestants are closed."""
    names = list(entrants)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for index in range(-1, rounds):
        for name in rotated(names, index):
            contestant, word = entrants[name]
            found = contestant.ask(word)
            if index >= 0:
                turns[name].append(found)
    for contestant in {contestant for contestant, _ in entrants.values()}:
        contestant.close()
        contestant.wait()
    return [_row(name, found) for name, found in turns.items()]


def _row(name: str, turns: list[dict[str, Any]]) -> Row:
    cpu = quantiles([turn["cpu_s"] for turn in turns])
    (num,) = {turn["num"] for turn in turns}
    return Row(
        name,
        num,
        len(turns),
        *cpu,
        quantiles([turn["wall_s"] for turn in turns])[1],
        round(num / cpu[1], 1),
        round(max(turn["peak_mib"] for turn in turns), 1),
        round(max(turn["extra_mib"] for turn in turns), 1),
    )


def ratios_to(rows: list[Row], peer: str) -> dict[str, float]:
    """Name -> how many times the peer's rate."""
    (base,) = [row.per_s for row in rows if row.name == peer]
    return {row.name: round(row.per_s / base, 2) for row in rows}


def turns_table(title: str, what: str, rows: list[Row]) -> Table:
    columns = ("contestant", what, "CPU s", "p20–p80", "wall s", f"{what} / CPU s", "peak MiB")
    table = build_table(title, *columns, "of the turn", text_columns=("contestant",))
    for row in rows:
        table.add_row(
            row.name,
            f"{row.num:,}",
            f"{row.cpu_p50_s:.2f}",
            f"{row.cpu_p20_s:.2f}–{row.cpu_p80_s:.2f}",
            f"{row.wall_p50_s:.2f}",
            f"{row.per_s:,.0f}",
            f"{row.peak_mib:,.0f}",
            f"{row.extra_mib:,.0f}",
        )
    return table


def report(
    title: str,
    what: str,
    rows: list[Row],
    bars: Sequence[Bar],
    arguments: Namespace,
    header: Mapping[str, Any],
    **found: Any,
) -> None:
    """On the screen, and with what else was found in the file that the arguments name."""
    console = Console(width=max(Console().width, 120))
    console.print(turns_table(title, what, rows))
    console.print(bar_table(list(bars)))
    if arguments.out is not None:
        each = {"bars": [asdict(bar) for bar in bars], "rows": [asdict(row) for row in rows]}
        write_json(arguments.out, dict(header), {**found, **each})
