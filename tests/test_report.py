"""The page about a run, read back as a browser would."""

from __future__ import annotations

import errno
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from torchrec_pt import files
from torchrec_pt.files import WriteError
from torchrec_pt.report import write_report

CONFIG: dict[str, Any] = {
    "run_dir": "runs/tiny",
    "seed": 17,
    "data": {"path": "data/tiny"},
    "model": {"backbone": "transformer", "dim": 16},
    "pretrain": {"objectives": [{"name": "masked_item"}, {"name": "contrastive"}]},
    "finetune": {"ranking": {"epochs": 3}, "ctr": {"epochs": 3}, "rating": None},
    "evaluate": {},
    "export": {},
    "show": {},
}
EVALUATION: dict[str, Any] = {
    "ranking": {
        "metrics": {
            "popularity": {"ndcg@10": 0.0311, "mrr": 0.0212},
            "pretrained": {"ndcg@10": 0.0623, "mrr": 0.0551},
            "scratch": {"ndcg@10": 0.0700, "mrr": 0.0601},
            "fine-tuned": {"ndcg@10": 0.0784, "mrr": 0.0592},
        },
        "control": {"ndcg@10": [0.0084, 0.0031], "mrr": [-0.0009, 0.0043]},
    },
    "ctr": {
        "metrics": {
            "biases": {"auc": 0.7411, "logloss": 0.5702},
            "scratch": {"auc": 0.7688, "logloss": 0.5561},
            "fine-tuned": {"auc": 0.7602, "logloss": 0.5433},
        },
        "control": {"auc": [-0.0086, 0.0021], "logloss": [-0.0128, 0.0022]},
    },
}


class Page(HTMLParser):
    """What a reader finds in the file.

    Attributes:
        rows: every table row as its cells' texts, bold ones between asterisks.
        verdicts: class -> texts of the cells that bear it.
        figures: of each figure, the texts of its SVG.
        attributes: (tag, name, value) of every element.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.verdicts: dict[str, list[str]] = {}
        self.figures: list[list[str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: Counter[str] = Counter()
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self._class = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag == "meta":
            return
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._class = dict(attrs).get("class") or ""
        elif tag == "svg":
            self.figures.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.text[tag] = self.text.get(tag, "") + data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += f"*{data}*" if "strong" in self._open else data
            for name in self._class.split():
                self.verdicts.setdefault(name, []).append(data)
        if self._open[-2:] == ["g", "text"]:
            self.figures[-1].append(data)

    def row(self, *start: str) -> list[str]:
        (found,) = [row for row in self.rows if row[: len(start)] == list(start)]
        return found


def _curve(task: str, metric: str, values: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "step": 9 * epoch,
            "losses": {task: 2.0 - 0.1 * epoch} if epoch else {},
            "metrics": {metric: value},
        }
        for epoch, value in enumerate(values)
    ]


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _write_stage(folder: Path, curve: list[dict[str, Any]], seconds: float, **more: Any) -> None:
    values = {"fingerprint": "f", "checkpoint": "c", "metrics": {}, "curve": curve}
    _write(folder / "result.json", {**values, "seconds": seconds, **more})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A whole run; ctr's monitor is one that falls."""
    folder = tmp_path / "tiny"
    _write(folder / "config.json", CONFIG)
    _write_stage(
        folder / "pretrain", _curve("masked_item", "ndcg@10", [0.01, 0.03, 0.06, 0.05]), 1000
    )
    arms = {"pretrained": [0.06, 0.08, 0.07], "scratch": [0.01, 0.05, 0.065]}
    for arm, values in arms.items():
        curve = _curve("ranking", "ndcg@10", values)
        _write_stage(folder / "finetune/ranking" / arm, curve, 100, monitor="ndcg@10")
    arms = {"pretrained": [0.69, 0.55, 0.58], "scratch": [0.51, 0.6, 0.7]}
    for arm, values in arms.items():
        curve = _curve("ctr", "logloss", values)
        _write_stage(folder / "finetune/ctr" / arm, curve, 67.4, monitor="logloss")
    _write(folder / "evaluate/result.json", EVALUATION)
    return folder


def _evaluated(folder: Path, evaluation: dict[str, Any]) -> Page:
    _write(folder / "evaluate/result.json", evaluation)
    return Page(write_report(folder))


def test_the_head_says_what_was_run_and_how_long_it_trained(run_dir: Path) -> None:
    path = write_report(run_dir)
    page = Page(path)
    assert path == run_dir / "report.html"
    assert page.text["h1"] == "tiny"
    assert page.text["dl"].split("\n")[1:-1] == [
        "  seed17",
        "  backbonetransformer",
        "  objectivesmasked_item, contrastive",
        "  tasksranking, ctr",
        "  training time1,335 s",
    ]
    assert "Not run" not in page.text["body"]


def test_what_pretraining_gave_is_a_row_of_each_task_and_metric(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    no_difference = "no clear difference"
    assert [row for row in page.rows if len(row) == 6][1:] == [
        ["ranking", "ndcg@10 ↑", "0.0700", "0.0784", "+0.0084 ± 0.0031", "better"],
        ["ranking", "mrr ↑", "0.0601", "0.0592", "−0.0009 ± 0.0043", no_difference],
        ["ctr", "auc ↑", "0.7688", "0.7602", "−0.0086 ± 0.0021", "worse"],
        ["ctr", "logloss ↓", "0.5561", "0.5433", "−0.0128 ± 0.0022", "better"],
    ]
    assert page.verdicts["better"] == ["better"] * 2
    assert page.verdicts["worse"] == ["worse"]
    assert page.verdicts["no-clear-difference"] == [no_difference]
    sentence = " ".join(page.text["p"].split())
    assert "ctr: better on 1 of 2 test metrics, worse on 1, no clear difference on 0." in sentence


@pytest.mark.parametrize(
    ("metric", "difference", "half_width", "verdict"),
    [
        ("ndcg@10", 0.02, 0.01, "better"),
        ("ndcg@10", -0.02, 0.01, "worse"),
        ("logloss", 0.02, 0.01, "worse"),
        ("rmse", -0.02, 0.01, "better"),
        ("mae", -0.02, 0.01, "better"),
        ("mrr", 0.01, 0.02, "no clear difference"),
        ("mae", -0.01, 0.01, "no clear difference"),
        ("hr@5", 0.0, 0.0, "no clear difference"),
        ("auc", 0.02, math.nan, "undefined"),
    ],
)
def test_the_verdict_is_whether_the_interval_leaves_0_on_the_good_side(
    run_dir: Path, metric: str, difference: float, half_width: float, verdict: str
) -> None:
    metrics = {"scratch": {metric: 0.5}, "fine-tuned": {metric: 0.5 + difference}}
    control = {metric: [difference, half_width]}
    page = _evaluated(run_dir, {"ranking": {"metrics": metrics, "control": control}})
    arrow = "↓" if metric in ("logloss", "rmse", "mae") else "↑"
    assert page.row("ranking", f"{metric} {arrow}")[-1] == verdict


def test_all_models_are_listed_and_bold_is_the_best_in_the_metrics_own_direction(
    run_dir: Path,
) -> None:
    page = Page(write_report(run_dir))
    assert [row for row in page.rows if len(row) < 6] == [
        ["metric", "popularity", "pretrained", "scratch", "fine-tuned"],
        ["ndcg@10 ↑", "0.0311", "0.0623", "0.0700", "*0.0784*"],
        ["mrr ↑", "0.0212", "0.0551", "*0.0601*", "0.0592"],
        ["metric", "biases", "scratch", "fine-tuned"],
        ["auc ↑", "0.7411", "*0.7688*", "0.7602"],
        ["logloss ↓", "0.5702", "0.5561", "*0.5433*"],
    ]


def test_a_metric_that_a_model_lacks_or_that_is_undefined_is_a_dash_and_never_the_best(
    run_dir: Path,
) -> None:
    metrics = {"biases": {"rmse": 0.9}, "scratch": {"rmse": math.nan, "mae": 0.7}}
    page = _evaluated(run_dir, {"rating": {"metrics": metrics, "control": {}}})
    assert page.row("rmse ↓") == ["rmse ↓", "*0.9000*", "–"]
    assert page.row("mae ↓") == ["mae ↓", "–", "*0.7000*"]


def test_calibration_is_judged_by_its_distance_from_1(run_dir: Path) -> None:
    metrics = {
        "biases": {"calibration": 1.3},
        "scratch": {"calibration": 0.8},
        "fine-tuned": {"calibration": 1.1},
    }
    control = {"calibration": [-0.1278, 0.05]}  # log 1.1 + log 0.8
    page = _evaluated(run_dir, {"ctr": {"metrics": metrics, "control": control}})
    compared, listed = (row for row in page.rows if "calibration → 1" in row)
    assert compared[2:] == ["0.8000", "1.1000", "−0.1278 ± 0.0500", "better"]
    assert listed == ["calibration → 1", "1.3000", "0.8000", "*1.1000*"]
    assert "better on 1 of 1 test metrics" in " ".join(page.text["p"].split())


def test_coverage_and_novelty_are_listed_and_not_judged(run_dir: Path) -> None:
    metrics = {
        "scratch": {"novelty@5": 8.0, "coverage@5": 0.5},
        "fine-tuned": {"novelty@5": 7.0, "coverage@5": 0.4},
    }
    control = {"novelty@5": [-1.0, 0.3]}
    page = _evaluated(run_dir, {"ranking": {"metrics": metrics, "control": control}})
    assert page.row("ranking", "novelty@5")[2:] == ["8.0000", "7.0000", "−1.0000 ± 0.3000", "lower"]
    assert page.row("novelty@5") == ["novelty@5", "8.0000", "7.0000"]
    assert page.row("coverage@5") == ["coverage@5", "0.5000", "0.4000"]
    assert "better on 0 of 0 test metrics" in " ".join(page.text["p"].split())
    assert len(page.figures) == 3  # no forest


def test_the_reliability_of_each_model_is_a_line_through_its_bins(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bins = [
        {"num_rows": 50, "prediction": 0.1, "share": 0.2, "half_width": 0.11},
        {"num_rows": 50, "prediction": 0.6, "share": 0.5, "half_width": 0.13},
    ]
    ctr = {**EVALUATION["ctr"], "reliability": {"biases": bins[:1], "fine-tuned": bins}}
    page = _evaluated(run_dir, {**EVALUATION, "ctr": ctr})
    assert len(page.figures) == 5
    assert page.figures[1][-2:] == ["biases", "fine-tuned"]
    assert {"mean prediction of a bin", "share that is clicked"} <= {*page.figures[1]}
    drawn: list[tuple[Any, Any, Any]] = []

    def errorbar(axes: Any, x: Any, y: Any, *, yerr: Any = None, **_: Any) -> None:
        if yerr is not None:
            drawn.append((x, y, yerr))

    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", errorbar)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: None)
    write_report(run_dir)
    assert drawn == [([0.1], [0.2], [0.11]), ([0.1, 0.6], [0.2, 0.5], [0.11, 0.13])]


def test_the_forest_turns_gains_to_the_right_in_percent_of_scratch(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, float]] = []

    def errorbar(axes: Any, x: float, y: float, *, xerr: float, **_: Any) -> None:
        drawn.append((x, xerr))

    page = Page(write_report(run_dir))
    assert page.figures[0][-4:] == ["ranking ndcg@10", "ranking mrr", "ctr auc", "ctr logloss"]
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", errorbar)
    write_report(run_dir)
    expected = [(12.0, 4.4286), (-1.4975, 7.1547), (-1.1186, 0.2731), (2.3017, 0.3956)]
    assert drawn == [pytest.approx(each, abs=1e-3) for each in expected]


def test_a_scratch_value_of_0_has_no_percent_and_is_left_out_of_the_forest(run_dir: Path) -> None:
    metrics = {"scratch": {"mrr": 0.0}, "fine-tuned": {"mrr": 0.1}}
    page = _evaluated(run_dir, {"ctr": {"metrics": metrics, "control": {"mrr": [0.1, 0.01]}}})
    assert page.row("ctr", "mrr ↑")[-1] == "better"
    assert len(page.figures) == 3


def test_both_arms_are_in_one_figure_with_the_best_epoch_of_each(run_dir: Path) -> None:
    _, pretraining, ranking, ctr = Page(write_report(run_dir)).figures
    assert {"masked_item", "pretraining: best 0.0600 at epoch 2"} <= {*pretraining}
    assert "ndcg@10 on validation" in pretraining  # where the result names no monitor
    assert "ndcg@10 on validation" in ranking
    assert {"pretrained: best 0.0800 at epoch 1", "scratch: best 0.0650 at epoch 2"} <= {*ranking}
    assert "logloss on validation" in ctr
    assert {"pretrained: best 0.5500 at epoch 1", "scratch: best 0.5100 at epoch 0"} <= {*ctr}
    assert {"pretrained", "scratch", "training loss", "epoch"} <= {*ctr}


def test_a_stage_that_trained_no_epoch_has_a_figure_of_its_start(run_dir: Path) -> None:
    _write_stage(run_dir / "pretrain", _curve("masked_item", "ndcg@10", [0.25]), 1)
    assert "pretraining: best 0.2500 at epoch 0" in Page(write_report(run_dir)).figures[1]


def test_names_and_settings_are_text_whatever_they_hold(run_dir: Path) -> None:
    hostile = "</pre><script>alert('ü & $x$')</script>"
    config = {**CONFIG, "seed": hostile, "data": {"path": hostile}}
    config["pretrain"] = {"objectives": [{"name": hostile}]}
    folder = run_dir.rename(run_dir.with_name("<b>&amp; ünïcode"))
    _write(folder / "config.json", config)
    _write_stage(folder / "pretrain", _curve(hostile, "<i>$m$", [0.1, 0.2]), 1, monitor="<i>$m$")
    page = Page(write_report(folder))
    assert page.text["h1"] == "<b>&amp; ünïcode"
    assert page.tags["script"] == page.tags["i"] == 0
    assert json.loads(page.text["pre"]) == config
    assert f"objectives{hostile}" in page.text["dl"]
    assert {hostile, "<i>$m$ on validation"} <= {*page.figures[1]}


def test_the_configuration_is_folded_away(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    assert json.loads(page.text["pre"]) == CONFIG
    assert page.text["details"].index("config.json") < page.text["details"].index("{")
    assert not [name for tag, name, _ in page.attributes if tag == "details"]


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path: Path) -> None:
    _write(tmp_path / "config.json", CONFIG)
    page = Page(write_report(tmp_path))
    text = page.text["p"]
    for missing in ("pretraining", "ranking (pretrained)", "ranking (scratch)", "ctr (scratch)"):
        assert f"Not run: {missing}." in text
    assert "Not run: evaluation." in text
    assert "Nothing to compare yet: evaluation has not been run." in text
    assert "rating" not in text
    assert page.rows == page.figures == []


def test_one_missing_arm_is_named_and_the_other_drawn(run_dir: Path) -> None:
    (run_dir / "finetune/ctr/scratch/result.json").unlink()
    page = Page(write_report(run_dir))
    assert re.findall(r"Not run: [^.]*", page.text["p"]) == ["Not run: ctr (scratch)"]
    assert not [text for text in page.figures[-1] if "scratch" in text]


def test_an_evaluation_without_control_says_that_nothing_can_be_compared(run_dir: Path) -> None:
    metrics = {"popularity": {"mrr": 0.03}, "pretrained": {"mrr": 0.05}}
    page = _evaluated(run_dir, {"ranking": {"metrics": metrics, "control": {}}})
    assert "there is nothing to compare" in page.text["p"]
    assert page.rows == [["metric", "popularity", "pretrained"], ["mrr ↑", "0.0300", "*0.0500*"]]


def test_a_run_without_pretraining_or_tasks_has_a_page(tmp_path: Path) -> None:
    _write(tmp_path / "config.json", {**CONFIG, "pretrain": None, "finetune": {}})
    page = Page(write_report(tmp_path))
    assert page.text["dl"].count("none") == 2
    assert "No training is configured." in page.text["p"]


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds no run; give the run_dir of") as caught:
        write_report(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_the_page_needs_nothing_beside_it(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    for tag in ("script", "link", "img", "image", "iframe", "object", "embed", "base"):
        assert page.tags[tag] == 0, tag
    links = {name for _, name, _ in page.attributes if "href" in name or name == "src"}
    assert links <= {"href", "xlink:href"}
    for _, name, value in page.attributes:
        if name in links:
            assert value.startswith("#")
        if not name.startswith("xmlns"):
            assert "//" not in value
    assert "@import" not in page.source
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}


def test_ids_are_unique_and_every_reference_finds_its_own(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    ids = Counter(value for _, name, value in page.attributes if name == "id")
    assert max(ids.values()) == 1
    values = " ".join(value for _, name, value in page.attributes if name != "style")
    references = set(re.findall(r"(?:url\(|(?<!\S))#([\w-]+)", values))
    assert references
    assert references <= ids.keys()


def test_the_same_run_gives_the_same_bytes_whatever_the_style_of_the_process(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_report(run_dir).read_bytes()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 31)
    assert write_report(run_dir).read_bytes() == before
    assert matplotlib.rcParams["font.size"] == 31


def test_a_page_that_could_not_be_written_leaves_the_old_one_whole(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    before = write_report(run_dir).read_bytes()
    _write(run_dir / "config.json", {**CONFIG, "seed": 18})
    monkeypatch.setattr(files, "fsync", fail)
    with pytest.raises(WriteError, match="No space left on device"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before
    monkeypatch.undo()
    assert b"<dd>18</dd>" in write_report(run_dir).read_bytes()
    assert not [path for path in run_dir.iterdir() if path.name.endswith(".partial")]
