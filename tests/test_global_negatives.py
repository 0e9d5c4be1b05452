"""Keys gathered or round a ring give the loss and gradients of one process with the whole batch."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.across_ranks import (
    BLOCK_BYTES,
    CUTS,
    LOSSES,
    MEMORY_RANKS,
    NUM_ROWS,
    Problem,
    problems,
)
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.global_negatives import Keys, symmetric_infonce_loss
from torchrec_pt.ops.reference import infonce_logits, infonce_loss_rows

WORKER = Path(__file__).parent / "across_ranks.py"
PROBLEMS = problems()
WAYS = pytest.mark.parametrize("way", list(LOSSES))
# float32 sums in another order; bfloat16 gradients are rounded block by block
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}

Results = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Number of ranks -> what they found."""
    out = tmp_path_factory.mktemp("across_ranks") / "out.pt"
    command = [sys.executable, str(WORKER), str(out), *map(str, CUTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {num_ranks: torch.load(f"{out}.{num_ranks}") for num_ranks in CUTS}


def _rows_and_keys(problem: Problem) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The rows of the whole batch that have a weight, all keys, and options of infonce_logits."""
    live = torch.ones(NUM_ROWS) if problem.row_weight is None else problem.row_weight
    of_rows = {
        "query_ids": problem.query_ids,
        "self_index": problem.self_index,
        "log_q_positive": problem.log_q_positive,
    }
    keys = problem.keys
    options: dict[str, Any] = {
        "temperature": problem.temperature.double(),
        "log_q": keys.log_q,
        "key_ids": keys.ids,
        "key_query_ids": keys.query_ids,
        "key_bias": None if keys.key_bias is None else keys.key_bias.double(),
        **{name: None if x is None else x[live != 0] for name, x in of_rows.items()},
    }
    return live.nonzero().squeeze(1), keys.vectors.double(), options


def _column_losses(query: Tensor, keys: Tensor, live: Tensor, options: dict[str, Any]) -> Tensor:
    """(B,) of the pairs in `live`: log Σ_r exp(c_ri) − c_ii."""
    of_pairs = {
        name: options[name] if options[name] is None else options[name][live]
        for name in ("key_ids", "key_query_ids")
    }
    c = infonce_logits(
        query,
        keys[live],
        torch.arange(len(live)),
        temperature=options["temperature"],
        query_ids=options["query_ids"],
        **of_pairs,
    )
    return c.logsumexp(0) - c.diagonal()


def _expected(problem: Problem) -> dict[str, Tensor]:
    """By the bare formulas, in float64 and one process."""
    live, keys, options = _rows_and_keys(problem)
    query = problem.query[live].double()
    leaves = {"query": query, "keys": keys, "temperature": options["temperature"]}
    if options["key_bias"] is not None:
        leaves["key_bias"] = options["key_bias"]
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss = infonce_loss_rows(query, keys, problem.target[live], **options)
    if problem.is_symmetric:
        loss = (loss + _column_losses(query, keys, live, options)) / 2
    if problem.row_weight is not None:
        loss = loss * problem.row_weight[live]
    upstream = torch.ones(NUM_ROWS) if problem.upstream is None else problem.upstream
    found = torch.autograd.grad((loss * upstream[live]).sum(), list(leaves.values()))
    gradients = dict(zip(leaves, found, strict=True))

    def in_place(rows: Tensor) -> Tensor:
        return torch.zeros(NUM_ROWS, *rows.shape[1:], dtype=rows.dtype).index_put((live,), rows)

    gradients["query"] = in_place(gradients["query"])
    rows = in_place(loss.detach())
    return {**gradients, "loss": rows.sum() if problem.upstream is None else rows}


@pytest.mark.parametrize("num_ranks", list(CUTS))
@pytest.mark.parametrize("name", list(PROBLEMS))
@WAYS
def test_ranks_give_the_loss_and_gradients_of_one_process(
    results: Results, num_ranks: int, name: str, way: str
) -> None:
    expected = _expected(PROBLEMS[name])
    tolerance = TOLERANCE[PROBLEMS[name].query.dtype]
    for cut in CUTS[num_ranks]:
        got = results[num_ranks][f"{cut}, {name}, {way}"]
        assert got.keys() == expected.keys()
        for part, value in expected.items():
            # Of a sum of terms of either sign, only the largest value tells the rounding.
            close = functools.partial(torch.testing.assert_close, rtol=tolerance)
            atol = tolerance * max(1.0, float(value.abs().max()))
            close(got[part].double(), value, atol=atol, msg=lambda m, p=part: f"{p}: {m}")


@pytest.mark.parametrize("num_ranks", list(CUTS))
def test_the_ring_gives_the_same_bits_again(results: Results, num_ranks: int) -> None:
    assert results[num_ranks]["is deterministic"]


def test_gathered_keys_are_in_rank_order_and_know_their_first(results: Results) -> None:
    found = results[3]["gathered"]
    assert found["first"] == [0, 0, 1]
    vectors, ids, *others = found["keys"]
    assert vectors.tolist() == [[1.0] * 3, [2.0] * 3, [2.0] * 3]
    assert ids.tolist() == [9] * 3
    assert others == [None] * 3
    assert found["no keys"].shape == (0, 3)


def test_the_ring_never_holds_more_than_two_ranks_keys(results: Results) -> None:
    for forward, backward in results[MEMORY_RANKS]["memory"]["ring"]:
        assert forward < 2.5 * BLOCK_BYTES  # the block in use and the one on its way
        assert backward < 4.5 * BLOCK_BYTES  # and the gradients of two
    # The measure sees what it is for: all ranks' keys, where they are gathered.
    for forward, _ in results[MEMORY_RANKS]["memory"]["gather"]:
        assert forward > MEMORY_RANKS * BLOCK_BYTES


@pytest.mark.parametrize("what", ["dim", "dtype", "fields"])
@WAYS
def test_ranks_whose_keys_differ_in_kind_are_all_refused(
    results: Results, way: str, what: str
) -> None:
    said = results[2]["refusals"][f"{way}, {what}"]
    for rank, line in enumerate(said):
        assert "the keys of all ranks must agree in D, fields and dtypes" in line
        assert f"rank {rank} gives D = " in line


# --- in one process -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _joined() -> Iterator[None]:
    with joined_ranks():
        yield


BAD = {
    "keys.vectors must be": {"keys": Keys(torch.ones(3))},
    "keys.ids must have shape": {"keys": Keys(torch.ones(3, 8), ids=torch.arange(2))},
    "target must be in": {"target": torch.tensor([0, 1, 3])},
    "temperature must be positive": {"temperature": 0.0},
    "row_weight must have shape": {"row_weight": torch.ones(3, 1)},
    "query_ids and keys.query_ids go together": {"query_ids": torch.arange(3)},
    "reduction must be": {"reduction": "mean"},
}


@pytest.mark.usefixtures("_joined")
@pytest.mark.parametrize("rule", list(BAD))
@WAYS
def test_bad_input_is_refused_with_the_rule(way: str, rule: str) -> None:
    good: dict[str, Any] = {"keys": Keys(torch.ones(3, 8)), "temperature": 1.0}
    with pytest.raises(ValueError, match=rule):
        LOSSES[way](torch.ones(3, 8), **{**good, **BAD[rule]})


@pytest.mark.usefixtures("_joined")
@pytest.mark.parametrize("is_symmetric", [False, True])
@WAYS
def test_there_is_no_second_derivative(way: str, is_symmetric: bool) -> None:
    query, keys = torch.randn(2, 3, 8).requires_grad_()
    loss = functools.partial(symmetric_infonce_loss, LOSSES[way]) if is_symmetric else LOSSES[way]
    total = loss(query, Keys(keys), temperature=1.0)
    (gradient,) = torch.autograd.grad(total, [query], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()
