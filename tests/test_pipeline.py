"""A whole run from the command line, and what it leaves."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from torch import nn

from tests.conftest import FEATURES, NUM_ITEMS, NUM_USERS, tiny_config
from torchrec_pt import Recommender, cli, export_embeddings, pipeline
from torchrec_pt.build import Built, build_learner
from torchrec_pt.checkpoint import Checkpoint
from torchrec_pt.config import Contrastive, RunConfig, ShowConfig, TrainConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import join_ranks
from torchrec_pt.runs import load_result, load_run_config, served_stage
from torchrec_pt.tables import print_evaluation
from torchrec_pt.transfer import Numbering, TransferReport, load_pretrained

WHAT = ("items", "users")
PAIRS = {"epochs": 2, "batch_size": 10, "warmup_steps": 0, "control": "scratch"}


@pytest.fixture(scope="module")
def finished(cycle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(
        cycle_folder,
        pretrain={
            "epochs": 40,
            "batch_size": 10,
            "warmup_steps": 0,
            "learning_rate": 0.02,
            "validate_every": 10,
            "objectives": [{"name": "masked_item", "mask_fraction": 0.3}],
        },
        finetune={
            "ranking": {
                "epochs": 8,
                "batch_size": 10,
                "warmup_steps": 0,
                "learning_rate": 0.01,
                "targets_per_user": 4,
                "control": "scratch",
            },
            "ctr": {**PAIRS, "positive_rating": 3},
            "rating": PAIRS,
        },
        evaluate={
            "ks": [1, 10],
            "baselines": ["popularity", "item_knn", "biases"],
            "candidates": {"num": 9},
        },
        export={"formats": ["parquet", "npy"]},
    ).model_copy(update={"run_dir": tmp_path_factory.mktemp("finished")})
    pipeline.run(config)
    return config


def test_the_table_has_every_model_and_the_fine_tuned_one_learned_the_circle(
    finished: RunConfig,
) -> None:
    written = json.loads((finished.run_dir / "evaluate/result.json").read_text())
    metrics = written["ranking"]["metrics"]
    assert list(metrics) == ["popularity", "item-kNN", "pretrained", "scratch", "fine-tuned"]
    # On the circle the next item is known nine times in ten; popularity knows nothing of it.
    assert metrics["fine-tuned"]["ndcg@10"] > 2 * metrics["popularity"]["ndcg@10"]
    difference, _ = written["ranking"]["control"]["ndcg@10"]
    gap = metrics["fine-tuned"]["ndcg@10"] - metrics["scratch"]["ndcg@10"]
    assert difference == pytest.approx(gap)


def test_every_task_has_its_control_and_their_paired_difference(finished: RunConfig) -> None:
    written = json.loads((finished.run_dir / "evaluate/result.json").read_text())
    assert list(written) == ["ranking", "sampled_ranking", "ctr", "rating"]
    clicks = ["auc", "gauc", "logloss", "ne", "calibration", "ece"]
    for task, metric_names in (("ctr", clicks), ("rating", ["rmse", "mae"])):
        metrics, control = written[task]["metrics"], written[task]["control"]
        assert list(metrics) == ["biases", "scratch", "fine-tuned"]
        assert list(metrics["biases"]) == list(control) == metric_names
        for name in metric_names:
            difference, half_width = control[name]
            a, b = metrics["fine-tuned"][name], metrics["scratch"][name]
            if name == "gauc":  # leave-one-out: no user has two rows
                assert all(map(math.isnan, (difference, half_width, a, b)))
                continue
            gap = abs(math.log(a)) - abs(math.log(b)) if name == "calibration" else a - b
            assert difference == pytest.approx(gap)
            assert half_width > 0


def test_what_the_lists_hold_is_told_of_every_model(finished: RunConfig) -> None:
    ranking = json.loads((finished.run_dir / "evaluate/result.json").read_text())["ranking"]
    for name, metrics in ranking["metrics"].items():
        for k in finished.evaluate.ks:
            assert 1 / NUM_ITEMS <= metrics[f"coverage@{k}"] <= min(1, NUM_USERS * k / NUM_ITEMS)
            # Items are about equally popular.
            assert metrics[f"novelty@{k}"] == pytest.approx(math.log2(NUM_ITEMS), abs=2), name
            assert f"coverage@{k}" not in ranking["control"]
            assert f"novelty@{k}" in ranking["control"]
    popularity, best = (ranking["metrics"][name] for name in ("popularity", "fine-tuned"))
    assert popularity["coverage@1"] < best["coverage@1"]
    assert popularity["novelty@1"] < best["novelty@1"]


def test_reliability_is_kept_of_every_model_and_drawn(finished: RunConfig) -> None:
    ctr = json.loads((finished.run_dir / "evaluate/result.json").read_text())["ctr"]
    assert list(ctr["reliability"]) == list(ctr["metrics"])
    for model, bins in ctr["reliability"].items():
        num_rows = sum(one["num_rows"] for one in bins)
        clicks = sum(one["num_rows"] * one["share"] for one in bins)
        predicted = sum(one["num_rows"] * one["prediction"] for one in bins)
        assert num_rows == NUM_USERS
        assert predicted / clicks == pytest.approx(ctr["metrics"][model]["calibration"])
    assert "share that is clicked" in (finished.run_dir / "report.html").read_text()


def test_both_protocols_are_judged_of_every_model_and_shown(finished: RunConfig) -> None:
    evaluation = pipeline.evaluate(finished)
    over_all, sampled = evaluation["ranking"], evaluation["sampled_ranking"]
    assert list(over_all.metrics) == list(sampled.metrics)
    assert sampled.protocol == "each test item among 9 drawn ones that its user never took"
    per_user = pl.read_parquet(finished.run_dir / "evaluate/sampled_ranking.parquet")
    for model, metrics in sampled.metrics.items():
        assert list(metrics) == ["hr@1", "ndcg@1", "hr@10", "ndcg@10", "mrr"]
        assert metrics["hr@10"] == 1  # a list has ten items
        assert metrics["mrr"] > over_all.metrics[model]["mrr"]
        assert per_user[f"{model} mrr"].mean() == pytest.approx(metrics["mrr"])
    difference, half_width = sampled.control["mrr"]
    gap = sampled.metrics["fine-tuned"]["mrr"] - sampled.metrics["scratch"]["mrr"]
    assert difference == pytest.approx(gap)
    assert half_width > 0

    console = Console(width=80, record=True, file=io.StringIO())
    print_evaluation(evaluation, console)
    screen = " ".join(console.export_text().split())
    page = (finished.run_dir / "report.html").read_text()
    for each in (over_all, sampled):
        assert each.protocol in screen
        assert each.protocol in page
    assert "sampled NDCG@10" in screen
    assert "<h3>sampled_ranking</h3>" in page


def test_predictions_are_kept_beside_the_labels_of_the_input_file(
    finished: RunConfig, cycle_folder: Path
) -> None:
    log = pl.read_csv(cycle_folder / "log.tsv", separator="\t")
    last = log.group_by("user_id", maintain_order=True).last()
    for task, label in (("rating", pl.col("rating")), ("ctr", pl.col("rating") >= 3)):
        found = pl.read_parquet(finished.run_dir / f"evaluate/{task}.parquet").sort("user")
        expected = last.select(user="user_id", item="item_id", label=label.cast(pl.Float32)).sort(
            "user"
        )
        assert found.select("user", "item", "label").equals(expected)
        assert found.select("biases", "scratch", "fine-tuned").null_count().sum_horizontal()[0] == 0


def test_the_report_is_written(finished: RunConfig) -> None:
    page = (finished.run_dir / "report.html").read_text()
    for words in ("ranking", "ctr", "rating", "item-kNN", "<svg"):
        assert words in page


def test_numpy_files_hold_what_the_parquet_files_do(finished: RunConfig) -> None:
    for what in ("items", "users"):
        folder = finished.run_dir / "export"
        expected = pl.read_parquet(folder / f"{what}.parquet")
        vectors = np.load(folder / f"{what}.npy", mmap_mode="r")
        ids = np.load(folder / f"{what}_ids.npy", allow_pickle=False)
        assert ids.tolist() == expected["id"].to_list()
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors, expected["embedding"].to_numpy())


def test_one_export_from_python_goes_where_it_is_asked(finished: RunConfig, tmp_path: Path) -> None:
    path = export_embeddings(finished.run_dir, "items", format="npy", out=tmp_path / "vectors")
    assert path == tmp_path / "vectors/items.npy"
    left = sorted(file.name for file in path.parent.iterdir())
    assert left == ["items.npy", "items.npy.json", "items_ids.npy"]
    assert np.array_equal(np.load(path), np.load(finished.run_dir / "export/items.npy"))
    with pytest.raises(ValueError, match="holds no run"):
        export_embeddings(tmp_path, "items")


def test_exported_embeddings_bear_the_ids_of_the_input_file(
    finished: RunConfig, cycle_folder: Path
) -> None:
    log = pl.read_csv(cycle_folder / "log.tsv", separator="\t")
    for what, column in (("items", "item_id"), ("users", "user_id")):
        exported = pl.read_parquet(finished.run_dir / f"export/{what}.parquet")
        assert sorted(exported["id"]) == sorted(log[column].unique())
        vectors = torch.tensor(exported["embedding"].to_list())
        assert vectors.shape == (len(exported), 16)
        assert torch.isfinite(vectors).all()


def test_exported_vectors_rank_as_the_recommender_does(finished: RunConfig) -> None:
    items = pl.read_parquet(finished.run_dir / "export/items.parquet")
    users = pl.read_parquet(finished.run_dir / "export/users.parquet")
    scores = (
        torch.tensor(users["embedding"][4].to_list())
        @ torch.tensor(items["embedding"].to_list()).T.contiguous()
    )
    expected = items["id"][scores.topk(7).indices.tolist()].to_list()
    found = Recommender.load(finished.run_dir).recommend(users["id"][4], k=7, exclude_seen=False)
    assert [one.item for one in found] == expected


def test_recommendations_leave_out_what_the_user_took(finished: RunConfig) -> None:
    dataset = PreparedDataset.load(finished.prepared_dir)
    recommender = Recommender.load(finished.run_dir)
    user = dataset.users["external_id"][0]
    seen = dataset.history("test").select(torch.tensor([0])).values.tolist()
    taken = set(dataset.items["external_id"][seen])
    found = {one.item for one in recommender.recommend(user, k=dataset.num_items)}
    assert found == set(dataset.items["external_id"]) - taken


def test_a_history_is_enough_for_a_user_never_seen(finished: RunConfig) -> None:
    recommender = Recommender.load(finished.run_dir)
    hits = 0
    for start in range(0, 27, 3):
        history = [f"i{start + step}" for step in range(3)]
        best = recommender.recommend(history=history, k=5)
        hits += f"i{start + 3}" in [one.item for one in best]
    # By chance 5 of the 27 other items hold the next one: 1.7 of 9.
    assert hits >= 5


def test_neither_user_nor_history_is_refused(finished: RunConfig) -> None:
    recommender = Recommender.load(finished.run_dir)
    with pytest.raises(ValueError, match="give either user or history"):
        recommender.recommend()
    with pytest.raises(ValueError, match='user "nobody"'):
        recommender.recommend("nobody")


def _built(config: RunConfig) -> Built:
    dataset = PreparedDataset.load(config.prepared_dir)
    return build_learner(config, TrainConfig(), [], dataset, join_ranks())


def _load_pretrained(
    path: Path, config: RunConfig, model: nn.Module | None = None
) -> TransferReport:
    """Into the configuration's model, or another one over the same items."""
    numbering = Numbering.of(PreparedDataset.load(config.prepared_dir))
    target: Any = model if model is not None else _built(config).model
    return load_pretrained(path, target, numbering, join_ranks())


def test_fine_tuning_loads_every_parameter_of_the_backbone(finished: RunConfig) -> None:
    pretrained = load_result(finished.run_dir / "pretrain")
    assert pretrained is not None
    report = _load_pretrained(pretrained.checkpoint, finished)
    held = Checkpoint.open(pretrained.checkpoint, join_ranks()).tensors
    assert report.loaded == sorted(name for name in held if name.startswith("model."))
    assert not report.new
    assert not report.dropped


def test_what_was_loaded_is_new_and_was_dropped_is_said(
    finished: RunConfig, tmp_path: Path
) -> None:
    pretrain = finished.pretrain
    assert pretrain is not None
    objective = Contrastive(name="contrastive", pairs="user_item")
    config = finished.model_copy(
        update={
            "run_dir": tmp_path,
            "pretrain": pretrain.model_copy(update={"epochs": 0, "objectives": (objective,)}),
        }
    )
    screen = io.StringIO()
    console = Console(file=screen, soft_wrap=True)
    pipeline.prepare(config)
    pipeline.pretrain(config)
    pipeline.finetune(config, console)
    said = screen.getvalue()
    for task in ("ctr", "ranking"):
        table = said[said.index(f"{task} (pretrained): what moved") :]
        lines = [line.split() for line in table.splitlines()]
        assert ["item", "table", "480", "0.01"] in lines  # 30 items of 16 numbers
        assert ["contrastive", "log", "temperature", "1"] in lines
    assert "ctr head" in said
    kept = load_result(tmp_path / "finetune/ctr/pretrained")
    assert kept is not None
    assert "model.objectives.ctr.item_bias.weight" in kept.values["transfer"]["new"]
    assert kept.values["transfer"]["dropped"] == ["model.objectives.contrastive.log_temperature"]
    assert "(scratch): what moved" not in said


def test_transfer_refuses_another_shape_and_another_model(finished: RunConfig) -> None:
    pretrained = load_result(finished.run_dir / "pretrain")
    assert pretrained is not None
    wider = finished.model.model_copy(update={"dim": 32})
    with pytest.raises(ValueError, match=r"is \(.*16.*\), the model wants \(.*32.*\)"):
        _load_pretrained(pretrained.checkpoint, finished.model_copy(update={"model": wider}))

    class Stranger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="no parameter in common"):
        _load_pretrained(pretrained.checkpoint, finished, Stranger())


def test_a_stage_refuses_the_data_of_another_configuration(finished: RunConfig) -> None:
    filtered = finished.data.filters.model_copy(update={"min_rating": 2.0})
    other = finished.model_copy(
        update={"data": finished.data.model_copy(update={"filters": filtered})}
    )
    for stage in (pipeline.pretrain, pipeline.finetune, pipeline.evaluate):
        with pytest.raises(ValueError, match=r"prepared from another .* run the prepare stage"):
            stage(other)
    pipeline.evaluate(finished)


def test_what_is_served_is_of_the_configuration_that_the_folder_holds(
    finished: RunConfig, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.run_dir, moved)
    assert served_stage(load_run_config(moved), Recommender.load(moved).dataset).folder == (
        moved / "finetune/ranking/pretrained"
    )
    config = json.loads((moved / "config.json").read_text())
    config["finetune"]["ranking"] = None
    (moved / "config.json").write_text(json.dumps(config))
    dataset = Recommender.load(moved).dataset
    assert served_stage(load_run_config(moved), dataset).folder == moved / "pretrain"
    config["model"]["dim"] = 32
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no model trained from its configuration"):
        Recommender.load(moved)


@pytest.mark.parametrize(
    ("show", "message"), [({"user": "nobody"}, 'user "nobody"'), ({"title": "x"}, "show.title")]
)
def test_what_cannot_be_shown_is_said_before_training(
    finished: RunConfig, tmp_path: Path, show: dict[str, str], message: str
) -> None:
    config = finished.model_copy(
        update={"run_dir": tmp_path, "show": ShowConfig.model_validate(show)}
    )
    with pytest.raises(ValueError, match=message):
        pipeline.run(config)
    assert not (tmp_path / "pretrain").exists()


def test_results_of_another_configuration_are_not_taken_for_this_one(finished: RunConfig) -> None:
    reseeded = finished.model_copy(update={"seed": 1})
    pipeline.prepare(reseeded)
    try:
        assert list(pipeline.evaluate(reseeded)["ranking"].metrics) == ["popularity", "item-kNN"]
        with pytest.raises(ValueError, match="no finished pretraining of this configuration"):
            pipeline.finetune(reseeded)
    finally:
        pipeline.prepare(finished)
        pipeline.evaluate(finished)


def test_a_control_asked_for_later_is_trained_alone(finished: RunConfig) -> None:
    assert finished.finetune.rating is not None
    without = finished.finetune.rating.model_copy(update={"control": None})
    later = finished.model_copy(
        update={"finetune": finished.finetune.model_copy(update={"rating": without})}
    )
    screen = io.StringIO()
    results = pipeline.finetune(later, Console(file=screen, soft_wrap=True))
    assert list(results["rating"]) == ["pretrained"]
    assert "rating (pretrained): done before" in screen.getvalue()


def _toml(folder: Path, cycle_folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(
        f'run_dir = "{folder / "run"}"\n'
        f'[data]\nformat = "tsv"\npath = "{cycle_folder / "log.tsv"}"\n'
        'columns = { timestamp = "timestamp" }\n'
        "[model]\ndim = 16\nnum_layers = 1\nmax_length = 8\n"
        '[pretrain]\nepochs = 1\nobjectives = [{ name = "masked_item" }]\n'
    )
    return path


def _exit_code(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["torchrec-pt", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_line_runs_the_stages_one_by_one(
    cycle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(_toml(tmp_path, cycle_folder))
    for stage in ("prepare", "pretrain", "evaluate", "export"):
        assert _exit_code(stage, config, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert _exit_code("recommend", config, "--user", "u3", "--k", "2", monkeypatch=monkeypatch) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert all(line["item"].startswith("i") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["pretrain", "{config}"], "no prepared dataset"),
        (["prepare", "{config}", "--set", "data.pth=1"], 'did you mean "path"?'),
        (["prepare", "{config}", "--set", "data.columns.user=who"], "user_id"),
        (["recommend", "{config}"], "holds no run"),
        (["finetune", "{config}"], "no task is configured"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    cycle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    config = _toml(tmp_path, cycle_folder)
    filled = [argument.format(config=config) for argument in arguments]
    assert _exit_code(*filled, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_autoencoder_serves_every_task_and_ranks_by_inner_product(
    cycle_folder: Path, tmp_path: Path
) -> None:
    """Its table has 24 columns, its vectors 16, with an item's bias and a user's 1 at the end."""
    steps = {"epochs": 2, "batch_size": 10, "warmup_steps": 0}
    config = tiny_config(
        cycle_folder,
        FEATURES,
        model={"backbone": "autoencoder", "dim": 16, "hidden_dims": [8], "row_dropout": 0.1},
        pretrain={
            **steps,
            "epochs": 40,
            "learning_rate": 0.02,
            "validate_every": 10,
            "objectives": [
                {"name": "autoencoder"},
                {"name": "contrastive", "pairs": "user_item", "weight": 0.1},
            ],
        },
        finetune={"ranking": steps, "ctr": {**steps, "positive_rating": 3}, "rating": steps},
        evaluate={"ks": [10], "baselines": ["popularity"]},
    ).model_copy(update={"run_dir": tmp_path})
    pipeline.run(config)
    written = json.loads((tmp_path / "evaluate/result.json").read_text())
    assert list(written) == ["ranking", "ctr", "rating"]
    metrics = written["ranking"]["metrics"]
    assert metrics["pretrained"]["ndcg@10"] > 1.5 * metrics["popularity"]["ndcg@10"]
    items, users = (pl.read_parquet(tmp_path / f"export/{what}.parquet") for what in WHAT)
    item_vectors, user_vectors = (
        torch.tensor(table["embedding"].to_list()) for table in (items, users)
    )
    assert item_vectors.shape == (30, 16)
    assert (user_vectors[:, -1] == 1).all()
    offered = Recommender.load(tmp_path).recommend(users["id"][4], k=7, exclude_seen=False)
    scores = dict(zip(items["id"], (item_vectors @ user_vectors[4]).tolist(), strict=True))
    assert [one.score for one in offered] == pytest.approx(
        sorted(scores.values(), reverse=True)[:7], rel=1e-4
    )
    for one in offered:
        assert one.score == pytest.approx(scores[one.item], rel=1e-4)
