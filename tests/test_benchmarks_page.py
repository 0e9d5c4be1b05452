"""docs/benchmarks.md: what the results say stands there, missed bars too."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HEADER = {
    "command": "python benchmarks/bench_ingest.py",
    "commit": "0123456789abcdef",
    "date": "2026-11-29T12:00:00+00:00",
    "machine": "a machine",
    "load_before": [0.5, 0.5, 0.5],
    "load_after": [1.5, 1.0, 0.5],
    "threads": 1,
    "torch": "2.13.0",
}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def bar(text: str, measured: float | None, met: bool | None) -> dict[str, object]:
    return {"text": text, "bound": "<= 1", "measured": measured, "where": "10 rows", "met": met}


def test_page_marks_missed_bars_and_what_was_not_measured_and_shows_the_plot(
    tmp_path: Path,
) -> None:
    from benchmarks_page import write_page

    sizes = [
        {"engine": engine, "num_rows": rows, "wall_p50_s": rows / 10, "driver_mib": 5.0}
        for engine in ("local", "ray")
        for rows in (10, 100)
    ]
    bars = [bar("slow", 2.0, False), bar("fast", 0.5, True), bar("absent", None, None)]
    results = tmp_path / "results"
    results.mkdir()
    (results / "ingest.json").write_text(json.dumps({**HEADER, "bars": bars, "sizes": sizes}))
    write_page(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| slow | <= 1 | 2 | 10 rows | **missed** |" in text
    assert "| fast | <= 1 | 0.5 | 10 rows | met |" in text
    assert "| absent | <= 1 |  | 10 rows | not measured |" in text
    assert "commit `0123456`" in text
    assert "![ingest](results/ingest.png)" in text
    assert (results / "ingest.png").stat().st_size > 0


def test_every_benchmark_of_the_page_is_there() -> None:
    from benchmarks_page import SECTIONS

    programs = {program for part in SECTIONS.values() for program in part.values()}
    assert {path.stem for path in BENCHMARKS.glob("bench_*.py")} >= programs
