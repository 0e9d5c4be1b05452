"""sampled_softmax_loss against float64, option by option, and the gradient of its table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.thread_counts import assert_same_bits
from torchrec_pt.ops import sampled_softmax_loss
from torchrec_pt.ops.reference import sampled_softmax_logits, sampled_softmax_loss_rows

Problem = dict[str, Any]

# B, M, V, D
SHAPES = [
    (0, 5, 10, 8),
    (5, 0, 10, 8),
    (1, 1, 3, 1),
    (1, 130, 7, 24),
    (70, 1, 2, 8),
    (33, 64, 1000, 64),
    (9, 65, 100, 96),
    (6, 200, 90, 128),
    (3, 129, 5000, 200),
    (2, 40, 60, 1000),
]
# On both sides of what the lanes of a GPU take at a time.
DIMS = [1, 8, 24, 31, 32, 36, 64, 100, 128, 200, 256, 260, 1024]
LEAVES = ("query", "table", "temperature")


def make(
    num_rows: int, num_negatives: int, num_items: int, dim: int, seed: int = 0, **like: Any
) -> Problem:
    """Where the rows name more ids than there are items: hits, and duplicates."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "query": torch.randn(num_rows, dim, generator=generator, **like),
        "table": torch.randn(num_items, dim, generator=generator, **like),
        "positive": torch.randint(num_items, (num_rows,), generator=generator),
        "negatives": torch.randint(num_items, (num_rows, num_negatives), generator=generator),
    }


def all_options(num_rows: int, num_negatives: int, seed: int = 1) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    log_q = torch.randn(num_rows, num_negatives, generator=generator)
    log_q[:, ::7] = torch.inf
    return {
        "temperature": torch.tensor(0.3),
        "log_q_positive": torch.randn(num_rows, generator=generator),
        "log_q_negatives": log_q,
    }


def of_one_size(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    """The problem with logits, and so their rounding, of about one size at every dim."""
    scaled = {name: problem[name] / problem[name].shape[1] ** 0.25 for name in ("query", "table")}
    return problem | {name: vectors.to(dtype) for name, vectors in scaled.items()}


def shared(problem: Problem) -> Problem:
    """The problem with the negatives of its first row for all rows."""
    names = [name for name in ("negatives", "log_q_negatives") if name in problem]
    return problem | {name: problem[name][0] for name in names}


def with_leaves(problem: Problem) -> tuple[Problem, list[Tensor]]:
    names = [name for name in LEAVES if name in problem]
    leaves = {name: problem[name].detach().clone().requires_grad_() for name in names}
    return problem | leaves, list(leaves.values())


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [grad.to_dense().double() for grad in torch.autograd.grad(loss, leaves)]


def rounding(problem: Problem, largest_logit: float) -> float:
    """A bound of what float32 leaves in a gradient, whatever its own size.

    p = exp(s − lse) carries the rounding of s, 6e-8 of its size, and a gradient multiplies it by a
    query or a row, over τ.
    """
    vectors = [problem[name].detach().abs().max().item() for name in ("query", "table")]
    reach = max(vectors) / torch.as_tensor(problem.get("temperature", 1.0)).item()
    return 2e-7 * largest_logit * max(1.0, reach)


def assert_matches_reference(problem: Problem, *, rtol: float = 1e-5, sparse: bool = True) -> None:
    """Losses, and the gradients under an arbitrary upstream (bound: 10 × rtol)."""
    problem, leaves = with_leaves(problem)
    num_rows = len(problem["query"])
    loss = sampled_softmax_loss(**problem, reduction="none", sparse=sparse)
    with torch.no_grad():
        assert torch.equal(sampled_softmax_loss(**problem, reduction="none"), loss)
    expected = sampled_softmax_loss_rows(**problem)
    # A loss is a difference of logits: its error is relative to the larger of them.
    scale = 1 + sampled_softmax_logits(**problem).detach().nan_to_num(neginf=0).abs().amax(1)
    assert ((loss - expected).abs() <= rtol * scale).all()
    upstream = torch.linspace(-1, 2, num_rows)
    ours = gradients((loss * upstream).sum(), leaves)
    theirs = gradients((expected * upstream).sum(), leaves)
    for grad, expected_grad in zip(ours, theirs, strict=True):
        largest = expected_grad.abs().max().item() if num_rows else 0.0
        atol = 10 * rtol * largest + rounding(problem, scale.max().item()) if num_rows else 0
        torch.testing.assert_close(grad, expected_grad, rtol=10 * rtol, atol=atol)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_reference(shape: tuple[int, int, int, int], sparse: bool) -> None:
    assert_matches_reference(make(*shape), sparse=sparse)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_reference_with_every_option(shape: tuple[int, int, int, int]) -> None:
    assert_matches_reference(make(*shape) | all_options(*shape[:2]))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_shared_negatives_match_float64_reference(
    shape: tuple[int, int, int, int], sparse: bool
) -> None:
    assert_matches_reference(shared(make(*shape)), sparse=sparse)
    assert_matches_reference(shared(make(*shape) | all_options(*shape[:2])), sparse=sparse)


@pytest.mark.parametrize("dim", DIMS)
def test_matches_reference_at_every_dim(dim: int) -> None:
    assert_matches_reference(of_one_size(make(7, 71, 40, dim)) | all_options(7, 71))


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1000.0])
def test_matches_reference_at_every_scale(scale: float, of: Callable[[Problem], Problem]) -> None:
    problem = of(make(40, 150, 300, 16))
    problem["query"] *= scale
    problem["query"][3] *= 100  # one row of a huge norm
    # float32 rounds a logit of size s by s·6e-8, which exp turns into a relative error.
    assert_matches_reference(problem, rtol=1e-5 * max(1.0, scale / 10))


def test_small_losses_keep_their_digits() -> None:
    query, table = torch.tensor([[12.0]]), torch.tensor([[1.0], [0.0]])
    negatives = torch.tensor([[1]])
    for ids in (negatives, negatives[0]):
        loss = sampled_softmax_loss(query, table, torch.tensor([0]), ids)
        torch.testing.assert_close(loss, torch.tensor(-12.0).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [2**24, 2**31])
def test_neighbouring_large_ids_are_told_apart(offset: int) -> None:
    """Each pair would be one id in float32 (above 2^24) or int32."""
    table = torch.randn(1, 8).expand(offset + 9, 8).requires_grad_()
    positive, negatives = offset + torch.arange(4), offset + torch.arange(4, 8).expand(4, -1)
    for ids in (negatives, negatives[0]):
        loss = sampled_softmax_loss(torch.randn(4, 8), table, positive, ids, reduction="none")
        torch.testing.assert_close(loss, torch.full((4,), 5.0).log())
        (grad,) = torch.autograd.grad(loss.sum(), table)
        assert torch.equal(grad.indices()[0], offset + torch.arange(8))


@pytest.mark.cpu_only
def test_rows_past_two_billion_values_are_read() -> None:
    table = torch.empty(2**26 + 1, 32, dtype=torch.float16)  # pages that nobody names cost nothing
    ids = torch.tensor([2**26, 2**26 - 1, 0])
    table[ids] = torch.randn(3, 32).half()
    few = {"query": torch.randn(1, 32), "table": table[ids], "positive": torch.tensor([0])}
    many = few | {"table": table, "positive": ids[:1], "negatives": ids[None, 1:]}
    expected = sampled_softmax_loss(**few, negatives=torch.tensor([[1, 2]]))
    assert torch.equal(sampled_softmax_loss(**many), expected)


# --- each option alone decides the loss ---------------------------------------------------------


def rival() -> Problem:
    """Row 0 prefers its negative 1 to its positive 0 by 50 / τ."""
    query = torch.tensor([[0.0, 50.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    return {
        "query": query,
        "table": torch.eye(4),
        "positive": torch.tensor([0, 3]),
        "negatives": torch.tensor([[1, 2, 0], [1, 2, 0]]),
    }


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize(
    "option",
    [
        {"log_q_negatives": torch.tensor([[torch.inf, 0.0, 0.0]]).expand(2, 3)},
        {"log_q_negatives": torch.tensor([[90.0, 0.0, 0.0]]).expand(2, 3)},
        {"log_q_positive": torch.tensor([-90.0, 0.0])},
        {"temperature": torch.tensor(1000.0)},
        {"positive": torch.tensor([1, 3])},
    ],
    ids=lambda option: "+".join(option),
)
def test_one_option_decides_the_loss(option: Problem, of: Callable[[Problem], Problem]) -> None:
    without = sampled_softmax_loss(**of(rival()), reduction="none")[0]
    problem = of(rival() | option)
    assert without > 49
    assert sampled_softmax_loss(**problem, reduction="none")[0] < 2
    assert_matches_reference(problem)


@pytest.mark.parametrize("of", [shared, dict])
def test_a_duplicate_counts_as_often_as_it_occurs(of: Callable[[Problem], Problem]) -> None:
    problem = {
        "query": torch.ones(70, 8),
        "table": torch.ones(2, 8),
        "positive": torch.zeros(70, dtype=torch.long),
        "negatives": torch.ones(70, 99, dtype=torch.long),
    }
    loss = sampled_softmax_loss(**of(problem), reduction="none")
    torch.testing.assert_close(loss, torch.full((70,), 100.0).log())


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("temperature", [0.07, 0.3, 1.0])
@pytest.mark.parametrize("why", ["hits", "log_q"])
def test_a_row_with_nothing_but_its_positive_gives_zero_and_no_gradient(
    why: str, temperature: float, of: Callable[[Problem], Problem]
) -> None:
    problem = make(30, 70, 5, 40) | {"temperature": torch.tensor(temperature)}
    if why == "hits":
        problem["positive"] = torch.full((30,), 3)
        problem["negatives"] = torch.full((30, 70), 3)
    else:
        problem["log_q_negatives"] = torch.full((30, 70), torch.inf)
    problem, leaves = with_leaves(of(problem))
    loss = sampled_softmax_loss(**problem, reduction="none")
    assert torch.equal(loss, torch.zeros(30))
    assert all(torch.count_nonzero(grad) == 0 for grad in gradients(loss.sum(), leaves))


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_removed_is_not_looked_at(bad: float, of: Callable[[Problem], Problem]) -> None:
    problem = make(9, 70, 50, 24)
    problem["negatives"][:, 5] = 49
    problem["positive"][:] = 7
    log_q = torch.zeros(9, 70).masked_fill(problem["negatives"] == 49, torch.inf)
    results = []
    for value in (0.0, bad):
        problem["table"][49] = value
        given, leaves = with_leaves(of(problem | {"log_q_negatives": log_q}))
        loss = sampled_softmax_loss(**given)
        results.append([loss, *gradients(loss, leaves)])
    for clean, result in zip(*results, strict=True):
        assert torch.equal(clean, result)


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["positive", "negatives"])
def test_a_bad_row_shows(where: str, bad: float, of: Callable[[Problem], Problem]) -> None:
    problem = make(3, 70, 50, 8)
    problem["table"][49] = bad
    problem["positive"] %= 49
    problem["negatives"] %= 49
    assert torch.isfinite(sampled_softmax_loss(**of(problem)))
    problem[where][..., -1] = 49
    loss = sampled_softmax_loss(**of(problem), reduction="none")
    assert not torch.isfinite(loss[-1])


# --- negatives that all rows share --------------------------------------------------------------


def test_shared_negatives_are_the_same_negatives_for_each_row() -> None:
    problem, leaves = with_leaves(make(20, 90, 60, 24) | all_options(20, 90))
    of_all = shared(problem)
    of_each = of_all | {n: of_all[n].expand(20, -1) for n in ("negatives", "log_q_negatives")}
    losses = [sampled_softmax_loss(**given, reduction="none") for given in (of_all, of_each)]
    torch.testing.assert_close(*losses)
    upstream = torch.linspace(-1, 2, 20)
    grads = [gradients((loss * upstream).sum(), leaves) for loss in losses]
    for ours, theirs in zip(*grads, strict=True):
        atol = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)


# --- weights and reductions ---------------------------------------------------------------------


@pytest.mark.parametrize("of", [shared, dict])
def test_reductions_weigh_the_rows(of: Callable[[Problem], Problem]) -> None:
    problem = of(make(9, 20, 50, 8))
    weight = torch.tensor([0.0, 1, 2, 0, 0.5, 3, 1, 1, 0])
    expected = sampled_softmax_loss_rows(**problem).float()
    rows, total, mean = (
        sampled_softmax_loss(**problem, row_weight=weight, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    torch.testing.assert_close(rows, expected * weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, (expected * weight).sum())
    torch.testing.assert_close(mean, (expected * weight).sum() / weight.sum())
    torch.testing.assert_close(sampled_softmax_loss(**problem), expected.mean())


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38])
def test_a_row_of_weight_zero_gives_zero_whatever_it_holds(
    bad: float, of: Callable[[Problem], Problem]
) -> None:
    weight = torch.tensor([0.0, 1, 1, 1])
    results = []
    for value in (0.5, bad):
        problem = of(make(4, 30, 20, 8)) | {"temperature": torch.tensor(0.5)}
        problem["query"][0] = value
        given, leaves = with_leaves(problem)
        rows = sampled_softmax_loss(**given, row_weight=weight, reduction="none")
        results.append([rows, *gradients(rows.sum(), leaves)])
    assert results[0][0][0] == 0
    assert torch.count_nonzero(results[0][1][0]) == 0
    for clean, result in zip(*results, strict=True):
        assert torch.equal(clean, result)


@pytest.mark.parametrize("of", [shared, dict])
def test_weights_that_sum_to_zero_give_zero(of: Callable[[Problem], Problem]) -> None:
    problem, leaves = with_leaves(of(make(4, 6, 9, 8)))
    loss = sampled_softmax_loss(**problem, row_weight=torch.zeros(4))
    assert loss == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in gradients(loss, leaves))


def test_an_empty_batch_gives_zero() -> None:
    problem, leaves = with_leaves(make(0, 5, 10, 8))
    for negatives in (problem["negatives"], torch.arange(5)):
        loss = sampled_softmax_loss(**(problem | {"negatives": negatives}))
        assert loss == 0
        assert all(torch.count_nonzero(grad) == 0 for grad in gradients(loss, leaves))


# --- the gradient of the table ------------------------------------------------------------------


def table_gradient(problem: Problem, **options: Any) -> Tensor:
    problem, (_, table) = with_leaves(problem)
    loss = sampled_softmax_loss(**problem, reduction="none", **options)
    upstream = torch.linspace(-1, 2, len(loss))
    return torch.autograd.grad((loss * upstream).sum(), table)[0]


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sparse_gradient_names_each_id_once_in_order(
    dtype: torch.dtype, of: Callable[[Problem], Problem]
) -> None:
    problem = of(make(40, 130, 3000, 24))
    problem["table"] = problem["table"].to(dtype)
    grad = table_gradient(problem)
    assert grad.is_coalesced()
    assert grad.dtype == dtype
    named = torch.cat((problem["positive"], problem["negatives"].flatten())).unique()
    assert torch.equal(grad.indices()[0], named)
    assert torch.equal(grad.to_dense(), table_gradient(problem, sparse=False))


def test_the_sparse_gradient_is_that_of_an_embedding() -> None:
    problem, (query, table) = with_leaves(make(40, 130, 300, 24))
    ids = torch.cat((problem["positive"][:, None], problem["negatives"]), 1)
    logits = torch.einsum("bd,bjd->bj", query, F.embedding(ids, table, sparse=True))
    is_hit = torch.cat((torch.zeros(40, 1), problem["negatives"] == ids[:, :1]), 1).bool()
    theirs = F.cross_entropy(
        logits.masked_fill(is_hit, -torch.inf), torch.zeros(40, dtype=torch.long)
    )
    expected = torch.autograd.grad(theirs, table)[0].coalesce()
    grad = torch.autograd.grad(sampled_softmax_loss(**problem), table)[0]
    assert torch.equal(grad.indices(), expected.indices())
    torch.testing.assert_close(grad.values(), expected.values(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_items", [1, 2, 2047, 2049, 2**22 + 1])
def test_ids_of_every_width_are_sorted(num_items: int) -> None:
    problem = make(30, 70, 1, 1) | {"table": torch.randn(num_items, 1)}
    generator = torch.Generator().manual_seed(num_items)
    for name in ("positive", "negatives"):
        problem[name] = torch.randint(num_items, problem[name].shape, generator=generator)
    problem["positive"][0] = num_items - 1
    assert_matches_reference(problem)


def test_an_item_named_many_times_gets_the_sum() -> None:
    """Its pairs span many blocks, chunks and threads."""
    problem = make(300, 20, 3, 8)
    problem["positive"][:] = 0
    problem["negatives"][:] = 1
    assert_matches_reference(problem)


@pytest.mark.parametrize("of", [shared, dict])
def test_a_table_that_is_an_activation_takes_a_dense_gradient(
    of: Callable[[Problem], Problem],
) -> None:
    problem, (_, table) = with_leaves(of(make(20, 30, 40, 8)))
    loss = sampled_softmax_loss(**(problem | {"table": 2 * table}), sparse=False)
    expected = sampled_softmax_loss_rows(**(problem | {"table": 2 * table})).mean()
    for ours, theirs in zip(gradients(loss, [table]), gradients(expected, [table]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad]
)
def test_optimizers_take_the_sparse_gradient(
    optimizer: Any, of: Callable[[Problem], Problem]
) -> None:
    problem = of(make(20, 30, 400, 8))
    start, table = problem["table"].clone(), problem["table"].requires_grad_()
    step = optimizer([table], lr=0.1)
    losses = []
    for _ in range(2):
        step.zero_grad()
        loss = sampled_softmax_loss(**problem)
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert table.grad is not None
    named = table.grad.coalesce().indices()[0]
    has_moved = (table.detach() != start).any(1)
    assert has_moved.any()
    assert not has_moved[~torch.isin(torch.arange(400), named)].any()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("of", [shared, dict])
def test_backward_can_be_repeated(of: Callable[[Problem], Problem], sparse: bool) -> None:
    problem, leaves = with_leaves(of(make(20, 30, 40, 8)))
    loss = sampled_softmax_loss(**problem, sparse=sparse)
    loss.backward(retain_graph=True)
    once = [leaf.grad.to_dense().clone() for leaf in leaves if leaf.grad is not None]
    assert len(once) == len(leaves)
    loss.backward()
    for leaf, grad in zip(leaves, once, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.to_dense(), 2 * grad)


@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("name", LEAVES)
def test_each_gradient_can_be_had_alone(name: str, of: Callable[[Problem], Problem]) -> None:
    problem, leaves = with_leaves(of(make(5, 7, 9, 8)) | {"temperature": torch.tensor(0.4)})
    expected = gradients(sampled_softmax_loss(**problem), leaves)[LEAVES.index(name)]
    alone = problem | {n: problem[n].detach() for n in LEAVES if n != name}
    (grad,) = gradients(sampled_softmax_loss(**alone), [problem[name]])
    assert torch.equal(grad, expected)


def test_a_vanishing_upstream_gives_finite_gradients() -> None:
    problem, leaves = with_leaves(make(4, 6, 9, 8))
    loss = sampled_softmax_loss(**problem, reduction="none")
    grads = torch.autograd.grad(loss, leaves, torch.full((4,), 1e-42))
    assert all(torch.isfinite(grad.to_dense()).all() for grad in grads)


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_near_that_of_pytorch(dtype: torch.dtype) -> None:
    problem = make(100, 120, 200, 64)
    for name in ("query", "table"):
        problem[name] = (problem[name] / 8).to(dtype)
    problem, leaves = with_leaves(problem)
    tau = 0.1
    ids = torch.cat((problem["positive"][:, None], problem["negatives"]), 1)
    is_hit = torch.cat((torch.zeros(100, 1), problem["negatives"] == ids[:, :1]), 1).bool()

    def eager(query: Tensor, table: Tensor) -> Tensor:
        logits = torch.einsum("bd,bjd->bj", query, table[ids]) / tau
        logits = logits.masked_fill(is_hit, -torch.inf)
        return F.cross_entropy(logits, torch.zeros(100, dtype=torch.long))

    exact = eager(*(leaf.float() for leaf in leaves))
    theirs = eager(*leaves)
    ours = sampled_softmax_loss(**problem, temperature=tau)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 1e-5
    grads = [gradients(loss, leaves) for loss in (exact, theirs, ours)]
    for expected, pytorch, grad in zip(*grads, strict=True):
        assert (grad - expected).abs().max() <= 3 * (pytorch - expected).abs().max() + 1e-7


# Twice the rounding of the type.
LARGEST_ERRORS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("query_dtype", ["float32", "its own"])
@pytest.mark.parametrize("of", [shared, dict])
@pytest.mark.parametrize("dim", [24, 31, 64, 128, 264])
@pytest.mark.parametrize("dtype", LARGEST_ERRORS)
def test_16_bits_match_reference_with_every_option(
    dtype: torch.dtype, dim: int, of: Callable[[Problem], Problem], query_dtype: str
) -> None:
    problem = of_one_size(make(11, 101, 60, dim), dtype) | all_options(11, 101)
    if query_dtype == "float32":
        problem["query"] = problem["query"].float()
    problem, leaves = with_leaves(of(problem))
    ours = sampled_softmax_loss(**problem, reduction="none")
    expected = sampled_softmax_loss_rows(**problem)
    # The inputs are exact and the logits float32: only gradients are rounded to 16 bits.
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-4, atol=1e-4)
    upstream = torch.linspace(-1, 2, 11)
    grads = gradients((ours * upstream).sum(), leaves)
    for grad, exact in zip(grads, gradients((expected * upstream).sum(), leaves), strict=True):
        assert (grad - exact).abs().max() <= LARGEST_ERRORS[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_as_it_is(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = bits[bits.float().abs() < 1e38].view(-1, 1)[::17]
    # s_1 − s_0 = v − 0, so that the loss is softplus(v).
    table = torch.cat((torch.zeros(1, 1, dtype=dtype), values))
    num = len(values)
    loss = sampled_softmax_loss(
        torch.ones(num, 1),
        table,
        torch.zeros(num, dtype=torch.long),
        torch.arange(1, num + 1)[:, None],
        reduction="none",
    )
    expected = F.softplus(values[:, 0].double(), threshold=50)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("of", [shared, dict])
def test_autocast_leaves_the_inputs_as_they_arrive(of: Callable[[Problem], Problem]) -> None:
    problem = of(make(6, 9, 20, 8))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sampled_softmax_loss(**problem)
    assert torch.equal(mixed, sampled_softmax_loss(**problem))


@pytest.mark.cpu_only
@pytest.mark.parametrize("of", [shared, dict])
def test_gradcheck_with_every_option(of: Callable[[Problem], Problem]) -> None:
    problem = of(make(5, 9, 7, 3, dtype=torch.float64) | all_options(5, 9))
    weight = torch.tensor([1.0, 0, 2, 3, 0.5])

    def loss(*values: Tensor) -> Tensor:
        given = problem | dict(zip(LEAVES, values, strict=True))
        return sampled_softmax_loss(**given, row_weight=weight, reduction="none", sparse=False)

    leaves = [problem[name].double().requires_grad_() for name in LEAVES]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(
    ("of", "name"), [(dict, name) for name in LEAVES] + [(shared, name) for name in LEAVES[:2]]
)
def test_second_derivative_is_refused(of: Callable[[Problem], Problem], name: str) -> None:
    problem, _ = with_leaves(of(make(3, 5, 9, 8)) | {"temperature": torch.tensor(0.4)})
    leaf = problem[name]
    loss = sampled_softmax_loss(**problem, sparse=False)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (grad + leaf).sum().backward()


# --- torch.library, torch.compile, threads, strides, memory -------------------------------------


def operands(dtype: torch.dtype = torch.float32, **changed: Any) -> tuple[Any, ...]:
    problem = make(6, 9, 20, 4) | all_options(6, 9) | changed
    for name in ("query", "table"):
        problem[name] = problem[name].to(dtype).requires_grad_()
    order = ["query", "table", "positive", "negatives", "temperature"]
    return tuple(problem[name] for name in [*order, "log_q_positive", "log_q_negatives"])


def test_opcheck() -> None:
    op = torch.ops.torchrec_pt.sampled_softmax_forward.default
    nothing = {"log_q_positive": None, "log_q_negatives": None, "temperature": torch.tensor(0.5)}
    for arguments in (operands(), operands(**nothing), operands(torch.bfloat16)):
        torch.library.opcheck(op, (*arguments, True, False))
    with torch.no_grad():
        constant = [None if x is None else x.detach() for x in operands()]
        torch.library.opcheck(op, (*constant, False, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_table_gradients(dtype: torch.dtype) -> None:
    query, table, positive, negatives, temperature, *_ = (x.detach() for x in operands())
    p = torch.rand(6, 9)
    arguments = (torch.rand(6), torch.rand(6), p, query, positive, negatives, temperature)
    for name in ("sparse", "dense"):
        op = getattr(torch.ops.torchrec_pt, f"sampled_softmax_backward_{name}").default
        torch.library.opcheck(op, (*arguments, len(table), dtype))


def test_compiles_to_one_graph() -> None:
    problem, leaves = with_leaves(make(20, 30, 40, 8) | all_options(20, 30))
    weight = torch.rand(20)
    compiled = torch.compile(sampled_softmax_loss, fullgraph=True, backend="aot_eager")
    losses = [
        f(**problem, row_weight=weight, sparse=False) for f in (compiled, sampled_softmax_loss)
    ]
    torch.testing.assert_close(*losses)
    for ours, eager in zip(*(gradients(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(ours, eager)


def test_exports() -> None:
    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(20, 8)

        def forward(self, query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
            return sampled_softmax_loss(query, self.table.weight, positive, negatives)

    module, problem = Objective(), make(6, 9, 20, 8)
    arguments = tuple(problem[name] for name in ("query", "positive", "negatives"))
    exported = torch.export.export(module, arguments)
    assert torch.equal(exported.module()(*arguments), module(*arguments))


@pytest.mark.parametrize("of", [shared, dict])
def test_strides_do_not_matter(of: Callable[[Problem], Problem]) -> None:
    wide, ids = torch.randn(200, 200), torch.randint(100, (60, 80))
    # A transpose, every second row and column, rows that start between 16 bytes, one row for all.
    queries = [wide[:24, :40].T, wide[::2, ::2][:40, :24], wide[:40, 1:25], wide[:1, :24]]
    tables = [wide[:24, 50:150].T, wide[::2, ::2][:, :24], wide[100:, 3:27], wide[:1, :24]]
    options = of(
        {
            "negatives": ids[10:50, 3::2],
            "log_q_negatives": torch.randn(39, 40).T,
            "positive": ids[0, ::2],
            "log_q_positive": torch.randn(()).expand(40),
        }
    )
    for query, table in zip(queries, tables, strict=True):
        strided = {"query": query.expand(40, 24), "table": table.expand(100, 24), **options}
        runs = []
        for given in (strided, {name: value.contiguous() for name, value in strided.items()}):
            leaves = [given[name].detach().requires_grad_() for name in ("query", "table")]
            given |= dict(zip(("query", "table"), leaves, strict=True))
            loss = sampled_softmax_loss(**given)
            runs.append([loss, *gradients(loss, leaves)])
        for ours, dense in zip(*runs, strict=True):
            torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_expanded_log_q_is_as_good_as_a_full_one(sparse: bool) -> None:
    problem, leaves = with_leaves(make(20, 90, 60, 24))
    log_q = torch.randn(20, 1).expand(20, 90)
    losses = [
        sampled_softmax_loss(**problem, log_q_negatives=each, sparse=sparse)
        for each in (log_q, log_q.contiguous())
    ]
    for ours, full in zip(*(gradients(loss, leaves) for loss in losses), strict=True):
        assert torch.equal(ours, full)


# Of shared negatives the products are the BLAS's.
@pytest.mark.parametrize(("of", "thread_counts"), [(shared, [1, 2]), (dict, [1, 2, 3, 7])])
def test_bits_do_not_depend_on_repeats_or_the_thread_count(
    of: Callable[[Problem], Problem], thread_counts: list[int]
) -> None:
    problem = of(make(150, 130, 3000, 40) | all_options(150, 130))
    problem["negatives"][..., ::3] = 7  # an item that no thread has to itself
    problem, leaves = with_leaves(problem)

    def run() -> list[Tensor]:
        loss = sampled_softmax_loss(**problem)
        return [loss, *gradients(loss, leaves)]

    assert_same_bits(run, thread_counts, by_blas=of is shared)


MEMORY_PROBE = """
import torch
from torchrec_pt.ops import sampled_softmax_loss

torch.set_num_threads(1)

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

def step(num_rows, num_negatives, num_items):
    query, table = (torch.randn(n, 64, requires_grad=True) for n in (num_rows, num_items))
    positive = torch.randint(num_items, (num_rows,))
    negatives = torch.randint(num_items, (num_rows, num_negatives))
    before_mib = status("VmRSS")
    loss = sampled_softmax_loss(query, table, positive, negatives, temperature=0.1)
    of_query, of_table = torch.autograd.grad(loss, (query, table))
    gradients_mib = (of_query.nbytes + of_table.values().nbytes + of_table.indices().nbytes) / 2**20
    return status("VmHWM") - before_mib - gradients_mib

step(16, 16, 100)  # loads the code
print(step(4096, 512, 200_000))
"""


@pytest.mark.cpu_only
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_no_gathered_rows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True, check=True
    )
    # MiB beyond the gradients: p and the pairs that are sorted. The rows would be 513.
    assert float(done.stdout) <= 40


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(3, 7)}, r"query must be \(B, D\) and table \(V, D\)"),
        ({"query": torch.ones(3)}, r"query must be \(B, D\)"),
        ({"table": torch.ones(5, 8, 1)}, r"query must be \(B, D\) and table \(V, D\)"),
        ({"query": torch.ones(3, 8, dtype=torch.long)}, "query and table must be float32"),
        ({"query": torch.ones(3, 8, dtype=torch.float64)}, "float64 query and table go together"),
        ({"positive": torch.tensor([0, 1])}, r"positive must have shape \[3\], got \[2\]"),
        ({"positive": torch.tensor([0, 1, 2]).int()}, "positive must be int64, got Int"),
        ({"positive": torch.tensor([0, 1, 5])}, r"positive must be in \[0, V\) with V = 5, got 5"),
        ({"positive": torch.tensor([0, -1, 2])}, r"positive must be in \[0, V\) .* got -1"),
        ({"negatives": torch.full((3, 4), 2**32)}, r"negatives must be in \[0, V\) .* 4294967296"),
        ({"negatives": torch.tensor([0, 1, -1])}, r"negatives must be in \[0, V\) .* got -1"),
        ({"table": torch.ones(0, 8)}, r"positive must be in \[0, V\) with V = 0"),
        ({"negatives": torch.zeros(3, 4)}, "negatives must be int64, got Float"),
        ({"negatives": torch.zeros(4).int()}, "negatives must be int64, got Int"),
        (
            {"negatives": torch.zeros(2, 4).long()},
            r"negatives must be \(M,\) or \(B, M\) with B = 3",
        ),
        ({"negatives": torch.zeros(3, 4, 1).long()}, r"negatives must be \(M,\) or \(B, M\)"),
        ({"temperature": 0.0}, "temperature must be positive, got 0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"temperature": torch.ones(1)}, "temperature must be a float or a 0-dim"),
        ({"log_q_positive": torch.ones(5)}, r"log_q_positive must have shape \[3\]"),
        ({"log_q_positive": torch.ones(3).long()}, "log_q_positive must be floating point"),
        ({"log_q_negatives": torch.ones(4)}, r"log_q_negatives must have shape \[3, 4\]"),
        ({"log_q_negatives": torch.ones(3, 4).long()}, "log_q_negatives must be floating point"),
        ({"row_weight": torch.ones(5)}, r"row_weight must have shape \(3,\)"),
        ({"reduction": "avg"}, 'reduction must be "none", "mean" or "sum"'),
    ],
)
def test_rejects_bad_input(change: Problem, message: str) -> None:
    good: Problem = {
        "query": torch.ones(3, 8),
        "table": torch.ones(5, 8),
        "positive": torch.tensor([0, 1, 2]),
        "negatives": torch.tensor([[0, 1, 2, 3]]).expand(3, 4),
    }
    of_all = good | {"negatives": torch.tensor([0, 1, 2, 3])}
    for problem in (good | change, of_all | change):
        if "log_q_negatives" in change and problem["negatives"].dim() == 1:
            continue
        with pytest.raises(ValueError, match=f"^sampled_softmax: {message}"):
            sampled_softmax_loss(**problem)
