"""Several processes train as one does."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FEATURES, tiny_config
from torchrec_pt.data.dataset import PreparedDataset

WORKER = Path(__file__).parent / "losses.py"

MASKED = {"name": "masked_item"}
NEXT = {"name": "next_item"}
VIEWS = {"name": "contrastive", "weight": 0.5, "learn_temperature": True}
PAIRS = {"name": "contrastive", "pairs": "user_item"}
RING = {"negatives_across_ranks": "ring"}
MIXED = {**PAIRS, "negatives": {"num": 11, "distribution": "log_uniform"}}
OWN = {"negatives": {"num": 7}}
SHARED = {"negatives": {"num": 13, "shared": True}}
PAIRS_OF: dict[str, dict[str, Any]] = {
    "ctr": {"positive_rating": 3, "cuts_per_user": 2},
    "rating": {"targets_per_cut": 3},
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

    def pretrain(*objectives: dict[str, Any]) -> dict[str, Any]:
        # 37 users in batches of 10: the last batch is 7, which two ranks do not divide.
        return {"batch_size": 10, "learning_rate": 0.01, "objectives": objectives}

    def ranking(loss: str) -> dict[str, Any]:
        return {"ranking": {"batch_size": 10, "learning_rate": 0.01, "loss": loss}}

    def pairs(task: str, model: dict[str, Any]) -> dict[str, Any]:
        config = tiny_config(
            folder,
            FEATURES,
            model={"dim": 16, "max_length": 8, **model},
            finetune={task: {"batch_size": 10, "learning_rate": 0.01, **PAIRS_OF[task]}},
        )
        return config.model_dump(mode="json")

    both = "bidirectional"
    towers = {"backbone": "two_tower", "hidden_dims": [8]}
    row_wise = {"item_table": {"placement": "row_wise", "optimizer": "rowwise_adagrad"}}
    replicated = {"placement": "replicated"}
    cases = {
        "masked + views": case(both, replicated, pretrain=pretrain(MASKED, VIEWS)),
        "pairs": case(both, replicated, pretrain=pretrain(PAIRS)),
        "views, ring": case(both, replicated, pretrain=pretrain({**VIEWS, **RING})),
        "pairs, ring": case(both, replicated, pretrain=pretrain({**PAIRS, **RING})),
        "pairs, mixed": case(both, replicated, pretrain=pretrain(MIXED)),
        "pairs, mixed, ring": case(both, replicated, pretrain=pretrain({**MIXED, **RING})),
        "next": case("causal", replicated, pretrain=pretrain(NEXT)),
        "next, sampled": case("causal", replicated, pretrain=pretrain({**NEXT, **OWN})),
        "masked, shared": case(both, replicated, pretrain=pretrain({**MASKED, **SHARED})),
        "softmax": case(both, replicated, finetune=ranking("softmax")),
        "bpr": case("causal", replicated, finetune=ranking("bpr")),
        "ctr": pairs("ctr", {"num_layers": 1}),
        "ctr two_tower row_wise": pairs("ctr", {**towers, **row_wise}),
        "rating": pairs("rating", {"num_layers": 1, "attention": "causal", **row_wise}),
        "rating two_tower": pairs("rating", towers),
        "two_tower": tiny_config(
            folder, FEATURES, model={"dim": 16, **towers}, pretrain=pretrain(PAIRS)
        ).model_dump(mode="json"),
    }
    for placement, optimizer in [
        ("row_wise", "sgd"),
        ("row_wise", "rowwise_adagrad"),
        ("table_wise", "adagrad"),
        ("column_wise", "adagrad"),
    ]:
        table = {"placement": placement, "optimizer": optimizer}
        name = f"{placement} {optimizer}"
        cases[name] = case(both, table, pretrain=pretrain(MASKED, VIEWS))
        cases[f"{name} softmax"] = case("causal", table, finetune=ranking("softmax"))
        cases[f"{name} bpr"] = case(both, table, finetune=ranking("bpr"))
        # The step's items, sampled ones and histories in one lookup.
        cases[f"{name} sampled"] = case("causal", table, pretrain=pretrain({**NEXT, **OWN}, MIXED))
        cases[f"{name} shared"] = case(both, table, pretrain=pretrain({**MASKED, **SHARED}, VIEWS))
    return cases


def _run(num_ranks: int, prepared: Path, cases: Path, out: Path) -> dict[str, Any]:
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(num_ranks)]
    command = [*launcher, str(WORKER), str(prepared), str(cases), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


Results = dict[str, dict[str, Any]]
MANY = [2, 3, pytest.param(4, marks=pytest.mark.soak)]


@pytest.fixture(scope="module")
def results(
    cycle_with_features: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Results]:
    """Number of ranks -> the results of every case; each number is run once."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = folder / "cases.json"
    cases.write_text(json.dumps(_cases(folder)))

    @functools.cache
    def run(num_ranks: int) -> Results:
        return _run(num_ranks, cycle_with_features.path, cases, folder / f"{num_ranks}.json")

    return run


@pytest.mark.parametrize("num_ranks", MANY)
@pytest.mark.parametrize("case", list(_cases(Path())))
def test_ranks_train_as_one_process(
    results: Callable[[int], Results], num_ranks: int, case: str
) -> None:
    one, many = results(1)[case], results(num_ranks)[case]
    assert len(one["losses"]) == 8
    for step, (expected, got) in enumerate(zip(one["losses"], many["losses"], strict=True)):
        # float32 sums in another order, over 8 updates at a large learning rate
        assert got == pytest.approx(expected, rel=1e-5), f"step {step}"
    assert one["losses"][0] != one["losses"][-1]


@pytest.mark.parametrize("num_ranks", MANY)
@pytest.mark.parametrize("case", list(_cases(Path())))
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
