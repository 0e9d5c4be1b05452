"""A finished run as a folder to hand on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import RUN
from torchrec_pt import Recommender, cli, export_package
from torchrec_pt.config import RunConfig
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.runs import load_run_config


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with joined_ranks():
        yield


@pytest.fixture(scope="module")
def package(finished_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_package(finished_run.run_dir, tmp_path_factory.mktemp("made") / "package")


def test_moved_to_another_place_it_answers_as_the_run_does(
    finished_run: RunConfig, package: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(package, moved)
    run, packed = Recommender.load(finished_run.run_dir), Recommender.from_pretrained(moved)
    for user in ("u0", "u9"):
        assert packed.recommend(user, k=5, explain=True) == run.recommend(user, k=5, explain=True)
        assert packed.score(["i1"], user=user) == run.score(["i1"], user=user)
        assert packed.predict_rating(["i1"], user=user) == run.predict_rating(["i1"], user=user)
    assert packed.similar_items("i1") == run.similar_items("i1")


def test_it_holds_no_leftovers_of_training_and_no_path_of_this_machine(
    finished_run: RunConfig, package: Path
) -> None:
    files = {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()}
    names = {name.rpartition("/")[2] for name in files}
    assert not names & {"plan.json", "report.html", "ranking.parquet"}
    assert not any("tensorboard" in name or "export/" in name for name in files)
    for stage in ("pretrain", "finetune/ranking/pretrained", "finetune/rating/scratch"):
        kept = {name.split("/")[-2] for name in files if name.startswith(f"{stage}/checkpoints")}
        best = json.loads((package / stage / "result.json").read_text())["checkpoint"]
        assert kept == {Path(best).name}
    for name in ("config.json", "README.md"):
        assert str(finished_run.run_dir.parent) not in (package / name).read_text()
    assert load_run_config(package).data.path == Path("log.tsv")


def test_the_card_has_the_test_metrics_with_intervals_and_what_it_was_trained_on(
    finished_run: RunConfig, package: Path
) -> None:
    card = (package / "README.md").read_text()
    evaluated = json.loads((finished_run.run_dir / "evaluate/result.json").read_text())
    for task, metric in (("ranking", "ndcg@5"), ("ctr", "auc"), ("rating", "rmse")):
        value = evaluated[task]["metrics"]["fine-tuned"][metric]
        assert f" {value:.4f} ± " in card, (task, metric)
        assert f'"type": "{metric}", "value": {round(value, 6)}' in card
    assert card.startswith("---\nlibrary_name: ")
    assert "37 users, 30 items" in card
    assert load_run_config(package).model_copy(update={"run_dir": Path()}).digest() in card
    for heading in ("Trained on", "Test", "Intended use", "Limits"):
        assert f"\n## {heading}\n" in card


def test_the_shell_makes_the_same_package(
    finished_run: RunConfig, package: Path, cycle_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    log = cycle_folder / "log.tsv"
    path.write_text(RUN.format(run_dir=finished_run.run_dir, log=log, epochs=1))
    done = CliRunner().invoke(cli.app, ["package", str(path), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    made, expected = (
        {
            file.relative_to(folder): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        for folder in (tmp_path / "out", package)
    )
    assert made == expected


def test_a_folder_that_stands_and_a_run_that_is_none_are_refused(
    finished_run: RunConfig, package: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="exists; remove it"):
        export_package(finished_run.run_dir, package)
    with pytest.raises(ValueError, match="holds no run"):
        export_package(tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_leaves_nothing_behind(
    finished_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchrec_pt.package.write_card", full)
    with pytest.raises(ValueError, match="No space left"):
        export_package(finished_run.run_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())
