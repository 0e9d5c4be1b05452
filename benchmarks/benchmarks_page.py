#!/usr/bin/env python3
"""docs/benchmarks.md from the results in benchmarks/results, whoever left them there and when.

python benchmarks/benchmarks_page.py        (`make bench` ends with it)
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

from conditions import ROOT
from run_results import markdown_table
from size_plots import save_size_plots

PAGE = ROOT / "docs/benchmarks.md"

# In the order of the page: heading, and of each result its file and the program that left it.
SECTIONS: dict[str, dict[str, str]] = {
    "The stages, beside what people use instead": {
        "prepare": "bench_prepare",
        "prepare_large": "bench_prepare",
        "sasrec": "bench_sasrec",
        "ctr": "bench_ctr",
        "multidae": "bench_multidae",
        "evaluate": "bench_evaluate",
    },
    "What comes out": {
        "export_parquet": "bench_export",
        "export_formats": "bench_export",
        "recommend": "bench_recommend",
        "serve": "bench_serve",
    },
    "The operators": {
        "infonce": "bench_infonce",
        "sampled_softmax": "bench_sampled_softmax",
        "negatives": "bench_negatives",
    },
    "Sharded tables, several processes, Ray": {
        "scale": "bench_scale",
        "ingest": "bench_ingest",
    },
}

HEAD = """# Benchmarks

`make bench` runs all of this and writes this page from `benchmarks/results`; a benchmark alone
leaves its part with `python benchmarks/NAME.py` and `python benchmarks/benchmarks_page.py`.
Contestants of one table ran in turns on one machine, the same data, sizes and number of threads:
their ratios say something, their seconds are of that machine on that day. Each line is the worst of
all sizes and rounds that it speaks of. The peers are RecBole 1.2.1 and RecTools 0.19.0 from PyPI,
in environments of their own (`make peers`), with what `benchmarks/peers` sets. No GPU has been
measured.
"""


def write_page(results: Path, page: Path) -> None:
    """A benchmark without a result is left out."""
    save_size_plots(results)
    parts = [HEAD]
    for heading, programs in SECTIONS.items():
        parts.append(f"## {heading}\n")
        for name, program in programs.items():
            path = results / f"{name}.json"
            if path.exists():
                result = json.loads(path.read_text(encoding="utf-8"))
                parts.append(_part(program, result, _picture(path.with_suffix(".png"), page)))
    page.write_text("\n".join(parts), encoding="utf-8")


def _picture(plot: Path, page: Path) -> str:
    return f"![{plot.stem}]({os.path.relpath(plot, page.parent)})\n" if plot.exists() else ""


def _part(program: str, result: dict[str, Any], picture: str) -> str:
    rows = [
        [bar["text"], bar["bound"], _measured(bar["measured"]), bar["where"], _mark(bar)]
        for bar in result["bars"]
    ]
    before, after = result["load_before"][0], result["load_after"][0]
    ran = (
        f"`{result['command']}`, {result['date'][:10]}, commit `{result['commit'][:7]}`, torch "
        f"{result['torch']}, {result['threads']} thread(s), {result['machine']}; load {before:g} "
        f"before, {after:g} after."
    )
    table = markdown_table(("what", "bar", "measured", "at", ""), rows)
    return "\n".join([f"### {_first_line(program)}\n", table, picture, ran, ""])


def _first_line(program: str) -> str:
    tree = ast.parse((ROOT / f"benchmarks/{program}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or program).partition("\n")[0].rstrip(".")


def _measured(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _mark(bar: dict[str, Any]) -> str:
    if bar["measured"] is None:
        return "not measured"
    return {True: "met", False: "**missed**", None: ""}[bar["met"]]


if __name__ == "__main__":
    write_page(ROOT / "benchmarks/results", PAGE)
    print(PAGE)
