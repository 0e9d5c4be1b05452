"""Several processes train as one does."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import FEATURES, tiny_config
from torchrec_pt.data.dataset import PreparedDataset

WORKER = Path(__file__).parent / "losses.py"

MASKED = {"name": "masked_item"}
NEXT = {"name": "next_item"}
VIEWS = {"name": "contrastive", "weight": 0.5, "learn_temperature": True}
CORRELATED = {**VIEWS, "augmentations": ["substitute", "insert"]}
PAIRS = {"name": "contrastive", "pairs": "user_item"}
SEGMENTS = {"name": "next_segment", "weight": 0.5}
DENOISING = {"name": "denoising"}
RING = {"negatives_across_ranks": "ring"}
MIXED = {**PAIRS, "negatives": {"num": 11, "distribution": "log_uniform"}}
OWN = {"negatives": {"num": 7}}
SHARED = {"negatives": {"num": 13, "shared": True}}
UNIFORM = {"num": 13, "distribution": "uniform"}
BCE = {"loss": "bce", "negatives": {**UNIFORM, "shared": True}}
GBCE = {"loss": "gbce", "negatives": UNIFORM}
# 37 users in batches of 10: the last batch is 7, which two ranks do not divide.
STEPS = {"batch_size": 10, "learning_rate": 0.01, "warmup_steps": 2}
FIRST = {"sgd": "masked + views", "adagrad": "shared", "rowwise_adagrad": "softmax"}
RATES = {"sgd": 0.3, "adagrad": 0.05, "rowwise_adagrad": 0.05}
KINDS = ("replicated", "row_wise", "table_wise", "column_wise", "planner")
TABLES: dict[tuple[str, str], dict[str, Any]] = {
    (placement, optimizer): {
        "placement": placement,
        "optimizer": optimizer,
        "learning_rate": RATES[optimizer],
    }
    for placement in KINDS
    for optimizer in RATES
    if (placement, optimizer) != ("column_wise", "rowwise_adagrad")
    and (placement != "planner" or optimizer == "rowwise_adagrad")
}
PAIRS_OF: dict[str, dict[str, Any]] = {
    "ctr": {"positive_rating": 3, "cuts_per_user": 2},
    "rating": {"targets_per_cut": 3},
}
OTHERS: dict[str, Any] = {"context": "others", "label_fraction": 0.6, "attention_heads": 2}
CLICKS: dict[str, Any] = {
    "positive_rating": None,
    "negatives": {"num": 3, "distribution": "uniform"},
    "interactions": ["cross", "dot"],
}


def _cases(folder: Path) -> dict[str, dict[str, Any]]:
    def case(attention: str, table: dict[str, Any], **sections: Any) -> dict[str, Any]:
        model = {
            "dim": 16,
            "num_layers": 1,
            "max_length": 8,
            "dropout": 0.2,
            "attention": attention,
            "item_table": table,
        }
        config = tiny_config(folder, model=model, **sections)
        return config.model_dump(mode="json")

    def hiding(attention: str, table: dict[str, Any], *objectives: dict[str, Any]) -> Any:
        config = case(attention, table, pretrain=pretrain(*objectives))
        config["model"] |= {"row_dropout": 0.4, "similarity": "cosine"}
        return config

    def at(positions: str, attention: str, *objectives: dict[str, Any]) -> Any:
        config = case(attention, {"placement": "replicated"}, pretrain=pretrain(*objectives))
        config["model"] |= {"positions": positions}
        return config

    def pretrain(*objectives: dict[str, Any]) -> dict[str, Any]:
        return {**STEPS, "objectives": objectives}

    def ranking(loss: str, **settings: Any) -> dict[str, Any]:
        return {"ranking": {**STEPS, "loss": loss, **settings}}

    def ranked(model: dict[str, Any], loss: str, **settings: Any) -> dict[str, Any]:
        config = tiny_config(
            folder,
            FEATURES,
            model={"dim": 16, "max_length": 8, **model},
            finetune=ranking(loss, **settings),
        )
        return config.model_dump(mode="json")

    def pairs(task: str, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
        config = tiny_config(
            folder,
            FEATURES,
            model={"dim": 16, "max_length": 8, **model},
            finetune={task: {**STEPS, **PAIRS_OF[task], **changes}},
        )
        return config.model_dump(mode="json")

    def autoencoder(model: dict[str, Any], **objective: Any) -> dict[str, Any]:
        config = tiny_config(
            folder,
            FEATURES,
            model={"backbone": "autoencoder", "dim": 16, "hidden_dims": [8], **model},
            pretrain=pretrain({"name": "autoencoder", **objective}),
        )
        return config.model_dump(mode="json")

    both = "bidirectional"
    towers = {"backbone": "two_tower", "hidden_dims": [8]}
    row_wise = {"item_table": TABLES["row_wise", "rowwise_adagrad"]}
    table_wise = {"item_table": TABLES["table_wise", "sgd"]}
    by_columns = {"item_table": TABLES["column_wise", "adagrad"]}
    replicated = {"placement": "replicated"}
    cases = {
        "masked + views": case(both, replicated, pretrain=pretrain(MASKED, VIEWS)),
        "correlated": case(both, row_wise["item_table"], pretrain=pretrain(CORRELATED)),
        "pairs, ring": case(both, replicated, pretrain=pretrain({**PAIRS, **RING})),
        "pairs, mixed": case(both, replicated, pretrain=pretrain(MIXED)),
        "next": case("causal", replicated, pretrain=pretrain(NEXT)),
        "next, sampled": case("causal", replicated, pretrain=pretrain({**NEXT, **OWN})),
        "masked, shared": case(both, replicated, pretrain=pretrain({**MASKED, **SHARED})),
        "next, gbce": case("causal", replicated, pretrain=pretrain({**NEXT, **GBCE})),
        "masked, bce": case(both, row_wise["item_table"], pretrain=pretrain({**MASKED, **BCE})),
        "masked + segments + denoising": case(
            both, replicated, pretrain=pretrain(MASKED, SEGMENTS, {**DENOISING, **OWN})
        ),
        "next + segments row_wise": case(
            "causal", row_wise["item_table"], pretrain=pretrain(NEXT, SEGMENTS)
        ),
        "denoising column_wise": case(both, by_columns["item_table"], pretrain=pretrain(DENOISING)),
        "hidden rows": hiding("causal", replicated, {**NEXT, "temperature": 0.1}, PAIRS),
        "hidden rows row_wise": hiding(
            both, row_wise["item_table"], {**MASKED, "temperature": 0.1}
        ),
        "rotary": at("rotary", both, MASKED, VIEWS),
        "relative time": at("relative_time", both, MASKED, VIEWS),
        "relative time, causal": at("relative_time", "causal", NEXT, PAIRS),
        "softmax": case(both, replicated, finetune=ranking("softmax")),
        "bpr": case("causal", replicated, finetune=ranking("bpr")),
        "softmax, linear": ranked({"num_layers": 1}, "softmax", head="linear", targets_per_cut=3),
        # With the towers' MLPs below it, the head's parts that a list's scores share (users and
        # their features) have gradients that all but cancel, of which AdamW makes whole steps.
        "softmax, sampled, mlp": ranked(
            {"num_layers": 1, **row_wise},
            "softmax",
            head="mlp",
            negatives={"num": 7},
            targets_per_cut=2,
        ),
        "hinge": ranked({"num_layers": 1, **row_wise}, "hinge", margin=0.5),
        "listnet": ranked(towers, "listnet", targets_per_cut=3, gain="rating"),
        "lambda": ranked(
            {"num_layers": 1}, "lambda", targets_per_cut=3, positive_rating=3, impressions=True
        ),
        "approx_ndcg": ranked({**towers, **row_wise}, "approx_ndcg", targets_per_cut=2),
        "ctr": pairs("ctr", {"num_layers": 1}),
        "ctr, relative time": pairs("ctr", {"num_layers": 1, "positions": "relative_time"}),
        "ctr column_wise": pairs("ctr", {"num_layers": 1, **by_columns}),
        "ctr two_tower row_wise": pairs("ctr", {**towers, **row_wise}),
        "ctr among others": pairs("ctr", {"num_layers": 1}, **OTHERS, loss="weighted"),
        "ctr of clicks": pairs("ctr", {"num_layers": 1}, **CLICKS, loss="focal"),
        "rating among others": pairs("rating", {**towers, **row_wise}, **OTHERS, loss="rmse"),
        "rating": pairs("rating", {"num_layers": 1, "attention": "causal", **row_wise}),
        "rating two_tower table_wise": pairs("rating", {**towers, **table_wise}),
        "rating two_tower": pairs("rating", towers),
        "hidden rows two_tower": tiny_config(
            folder,
            FEATURES,
            model={"dim": 16, **towers, "row_dropout": 0.4},
            pretrain=pretrain(PAIRS),
        ).model_dump(mode="json"),
        "two_tower": tiny_config(
            folder, FEATURES, model={"dim": 16, **towers}, pretrain=pretrain(PAIRS)
        ).model_dump(mode="json"),
        "two_tower, pairs + segments": tiny_config(
            folder, FEATURES, model={"dim": 16, **towers}, pretrain=pretrain(PAIRS, SEGMENTS)
        ).model_dump(mode="json"),
    }
    stars = {"values": "rating", "loss": "mse", "corruption": 0.2}
    cases |= {
        "autoencoder": autoencoder({"variational": True}, anneal_steps=6),
        "autoencoder row_wise": autoencoder({"variational": True, **row_wise}, temperature=0.5),
        "autoencoder mse": autoencoder({}, loss="mse", positive_weight=5.0),
        "autoencoder mse row_wise": autoencoder(row_wise, loss="mse", positive_weight=5.0),
        "autoencoder bce": autoencoder({}, loss="bce"),
        "autoencoder bce column_wise": autoencoder(by_columns, loss="bce"),
        "autoencoder ratings table_wise": autoencoder(table_wise, **stars),
    }
    for (placement, optimizer), table in TABLES.items():
        for name, (attention, sections) in _workloads(pretrain, ranking)[optimizer].items():
            cases[f"{placement} {optimizer}, {name}"] = case(attention, table, **sections)
    return cases


def _workloads(
    pretrain: Callable[..., Any], ranking: Callable[[str], Any]
) -> dict[str, dict[str, tuple[str, dict[str, Any]]]]:
    """Optimizer of a table -> name -> attention and sections; every kind of table gets them."""
    both = "bidirectional"
    return {
        "sgd": {
            "masked + views": (both, {"pretrain": pretrain(MASKED, VIEWS)}),
            # The step's items, sampled ones and histories in one lookup.
            "sampled": ("causal", {"pretrain": pretrain({**NEXT, **OWN}, {**MIXED, **RING})}),
        },
        "adagrad": {
            "next + pairs": ("causal", {"pretrain": pretrain(NEXT, PAIRS)}),
            "shared": (both, {"pretrain": pretrain({**MASKED, **SHARED}, {**VIEWS, **RING})}),
        },
        "rowwise_adagrad": {
            "softmax": ("causal", {"finetune": ranking("softmax")}),
            "bpr": (both, {"finetune": ranking("bpr")}),
        },
    }


def _run(num_ranks: int, prepared: Path, cases: dict[str, Any], folder: Path) -> Results:
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(num_ranks)]
    folder.mkdir()
    asked, out = folder / "cases.json", folder / "results.json"
    asked.write_text(json.dumps(cases))
    command = [*launcher, str(WORKER), str(prepared), str(asked), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result: Results = json.loads(out.read_text())
    return result


Results = dict[str, dict[str, Any]]
MANY = [2, 3, pytest.param(4, marks=pytest.mark.soak)]
NAMES = list(_cases(Path()))
# One a kind and optimizer.
CONTINUED = [f"{kind} {optimizer}, {FIRST[optimizer]}" for kind, optimizer in TABLES]
OF_TABLES = [name for name in NAMES if ", " in name and name.split()[0] in KINDS]


def _saved(folder: Path, case: str) -> str:
    return str(folder / "saved" / str(NAMES.index(case)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(cycle_with_features: PreparedDataset, folder: Path) -> Callable[[int], Results]:
    """Number of ranks -> the results of every case; each number is run once.

    Two ranks leave checkpoints in the middle.
    """

    @functools.cache
    def run(num_ranks: int) -> Results:
        cases = {
            name: {"config": config}
            | ({"save": _saved(folder, name)} if num_ranks == 2 and name in CONTINUED else {})
            for name, config in _cases(folder).items()
        }
        return _run(num_ranks, cycle_with_features.path, cases, folder / str(num_ranks))

    return run


@pytest.fixture(scope="module")
def continued(
    cycle_with_features: PreparedDataset, folder: Path, results: Callable[[int], Results]
) -> Callable[[int], Results]:
    """Number of ranks -> the second epoch of a case, from what two ranks saved of its `_source`."""

    @functools.cache
    def run(num_ranks: int) -> Results:
        results(2)
        configs = _cases(folder)
        cases = {
            name: {"config": configs[name], "load": _saved(folder, _source(name))}
            for name in CONTINUED
        }
        path = folder / f"continued-{num_ranks}"
        return _run(num_ranks, cycle_with_features.path, cases, path)

    return run


def _source(case: str) -> str:
    """The same case with the kind of table before it in the circle of those that it has."""
    kind, rest = case.split(" ", 1)
    circle = [k for k in KINDS if f"{k} {rest}" in NAMES]
    return f"{circle[circle.index(kind) - 1]} {rest}"


# Ranks add the same float32 numbers up in another order. What that makes of the tables after 8
# steps was measured relative to how far a table (or its state) came: 7e-7 under sgd and row-wise
# Adagrad; up to 3e-5 under Adagrad and AdamW, which divide each element by its own size, so that
# one whose gradient all but cancels is known to few digits. The losses agree to 6e-7.
# One rank's gradient scaled by 1.001 gives 4e-4 and more; a row updated twice, 7e-3 and more.
LOSSES_AGREE = 5e-6
TABLES_AGREE = {"sgd": 1e-5, "rowwise_adagrad": 1e-5}
ELEMENTS_AGREE = 1e-4


def _assert_same_tables(case: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    for what in ("after", "state"):
        assert one[what].keys() == other[what].keys()
        for name, expected in one[what].items():
            start = one["before"][name] if what == "after" else np.zeros_like(expected)
            change = np.abs(np.subtract(expected, start)).max()
            assert change > 0, name
            deviation = np.abs(np.subtract(other[what][name], expected)).max() / change
            is_own = ".embeddings.item." in name
            optimizer = case.split(",")[0].split(" ")[-1]
            limit = TABLES_AGREE.get(optimizer, ELEMENTS_AGREE) if is_own else ELEMENTS_AGREE
            assert deviation <= limit, f"{name}, {what}: {deviation:.1e}"


@pytest.mark.parametrize("num_ranks", MANY)
@pytest.mark.parametrize("case", NAMES)
def test_ranks_train_as_one_process(
    results: Callable[[int], Results], num_ranks: int, case: str
) -> None:
    one, many = results(1)[case], results(num_ranks)[case]
    assert np.shape(one["losses"])[0] == 8
    assert one["losses"][0] != one["losses"][-1]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=LOSSES_AGREE)
    assert many["before"] == one["before"]
    _assert_same_tables(case, one, many)


@pytest.mark.parametrize("case", [c for c in OF_TABLES if not c.startswith("replicated")])
def test_a_sharded_table_trains_as_a_replicated_one(
    results: Callable[[int], Results], case: str
) -> None:
    sharded = results(1)[case]
    replicated = results(1)[f"replicated {case.split(' ', 1)[1]}"]
    np.testing.assert_allclose(sharded["losses"], replicated["losses"], rtol=LOSSES_AGREE)
    _assert_same_tables(case, replicated, sharded)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("case", CONTINUED)
def test_a_checkpoint_of_two_ranks_goes_on_under_another_plan_on_another_number_of_ranks(
    results: Callable[[int], Results],
    continued: Callable[[int], Results],
    num_ranks: int,
    case: str,
) -> None:
    whole, rest = results(1)[case], continued(num_ranks)[case]
    assert results(2)[_source(case)]["plan"] != rest["plan"]
    np.testing.assert_allclose(rest["losses"], whole["losses"][4:], rtol=LOSSES_AGREE)
    _assert_same_tables(case, whole, rest)


@pytest.mark.parametrize("num_ranks", MANY)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_live_where_their_placement_says(
    results: Callable[[int], Results], num_ranks: int, kind: str
) -> None:
    for case in (case for case in OF_TABLES if case.startswith(f"{kind} ")):
        got, num_holders = results(num_ranks)[case]["plan"]
        assert got == kind if kind != "planner" else got in ("table_wise", "row_wise")
        # 16 columns go in parts of 8 to three ranks, since a part is a multiple of 4
        expected = {"table_wise": 1, "column_wise": 2 if num_ranks == 3 else num_ranks}
        assert num_holders == expected.get(got, num_ranks)


@pytest.mark.parametrize("num_ranks", MANY)
@pytest.mark.parametrize("case", NAMES)
def test_ranks_rank_the_test_items_as_one_process(
    results: Callable[[int], Results], num_ranks: int, case: str
) -> None:
    assert results(num_ranks)[case]["ranks"] == results(1)[case]["ranks"]


@pytest.mark.parametrize("num_ranks", MANY)
@pytest.mark.parametrize("case", [c for c in _cases(Path()) if c.startswith(("ctr", "rating"))])
def test_ranks_predict_clicks_and_ratings_as_one_process(
    results: Callable[[int], Results], num_ranks: int, case: str
) -> None:
    one, many = results(1)[case]["predictions"], results(num_ranks)[case]["predictions"]
    # After 8 updates at a large learning rate whose losses agree to 1e-5
    assert many == pytest.approx(one, rel=1e-4)
