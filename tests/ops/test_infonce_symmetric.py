from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_infonce import (
    BIG,
    DIMS,
    all_options,
    assert_16_bit_matches_reference,
    assert_same_bits_on_two_threads,
    gradients,
    make,
    of_one_size,
    rounding,
)
from torchrec_pt.ops import infonce_loss
from torchrec_pt.ops.reference import infonce_logits, infonce_loss_rows, infonce_symmetric_rows

# Shapes on both sides of a tile (256 rows, 512 keys) and of a vector.
SHAPES = [
    (0, 5, 8),
    (1, 1, 8),
    (1, 600, 31),
    (2, 2, 24),
    (65, 250, 31),
    (257, 1025, 96),
    (300, 300, 64),
    (600, 700, 256),
]
LEAVES = ("query", "keys", "temperature", "key_bias")


def pairs(num_rows: int, num_keys: int, dim: int, **like: Any) -> dict[str, Any]:
    problem = make(num_rows, num_keys, dim, **like)
    del problem["target"]
    return problem


def every_option(num_rows: int, num_keys: int) -> dict[str, Any]:
    weight = torch.linspace(0.5, 2, num_rows)
    weight[1::5] = 0
    return all_options(num_rows, num_keys) | {"row_weight": weight}


def with_leaves(problem: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    problem = problem | {n: problem[n].clone().requires_grad_() for n in LEAVES if n in problem}
    return problem, [problem[n] for n in LEAVES if n in problem]


def symmetric_rows(problem: dict[str, Any]) -> Tensor:
    """The losses before weights, as the reference gives them."""
    weight = problem.get("row_weight")
    loss = infonce_loss(**problem, symmetric=True, reduction="none")
    return loss if weight is None else loss / torch.where(weight == 0, 1, weight)


def assert_matches_reference(problem: dict[str, Any], rtol: float = 1e-5) -> None:
    """Losses, and the gradients under an arbitrary upstream (bound: 10 × rtol)."""
    problem, leaves = with_leaves(problem)
    loss, expected = symmetric_rows(problem), infonce_symmetric_rows(**problem)
    # A loss is a difference of logits: its error is relative to the largest of them.
    options = {n: v for n, v in problem.items() if n != "row_weight"}
    target = torch.arange(loss.numel())
    logits = infonce_logits(**options, target=target).detach().nan_to_num(neginf=0).abs()
    scale = 1 + (logits.max().item() if logits.numel() else 0.0)
    assert loss.dtype == torch.float32
    assert ((loss - expected).abs() <= rtol * scale).all()
    upstream = torch.linspace(-1, 2, loss.numel())
    ours = gradients((loss * upstream).sum(), leaves)
    theirs = gradients((expected * upstream).sum(), leaves)
    for grad, expected_grad in zip(ours, theirs, strict=True):
        largest = expected_grad.abs().max().item() if expected_grad.numel() else 0.0
        # Each direction adds its rounding.
        atol = 10 * rtol * largest + (2 * rounding(problem, scale) if loss.numel() else 0)
        torch.testing.assert_close(grad, expected_grad, rtol=10 * rtol, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_reference(shape: tuple[int, int, int]) -> None:
    assert_matches_reference(pairs(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_reference_with_every_option(shape: tuple[int, int, int]) -> None:
    assert_matches_reference(pairs(*shape) | every_option(*shape[:2]))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("num_rows", "num_keys"), [(67, 201), (131, 131)])
def test_matches_reference_at_every_dim(num_rows: int, num_keys: int, dim: int) -> None:
    problem = of_one_size(pairs(num_rows, num_keys, dim))
    assert_matches_reference(problem | every_option(num_rows, num_keys))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_match_reference_with_every_option(dtype: torch.dtype, dim: int) -> None:
    problem = of_one_size(pairs(131, 201, dim), dtype) | every_option(131, 201)
    leaves = [problem[name].requires_grad_() for name in ("query", "keys")]
    expected = infonce_symmetric_rows(**problem)
    assert_16_bit_matches_reference(symmetric_rows(problem), expected, leaves, dtype)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
def test_matches_reference_at_every_scale(scale: float) -> None:
    problem = pairs(40, 1100, 16)
    problem["query"] *= scale
    problem["query"][3] *= 100  # one row of a huge norm
    # float32 rounds a logit of size s by s·6e-8, which exp turns into a relative error.
    assert_matches_reference(problem, rtol=1e-5 * max(1.0, scale / 10))


def test_is_the_average_of_two_losses_where_square() -> None:
    q, k = torch.randn(70, 8), torch.randn(70, 8)
    average = (infonce_loss(q, k) + infonce_loss(k, q)) / 2
    torch.testing.assert_close(infonce_loss(q, k, symmetric=True), average)


def test_is_unchanged_when_queries_and_keys_change_places() -> None:
    q, k = torch.randn(300, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    loss, exchanged = infonce_loss(q, k, symmetric=True), infonce_loss(k, q, symmetric=True)
    torch.testing.assert_close(loss, exchanged)
    grads = zip(
        torch.autograd.grad(loss, (q, k)), torch.autograd.grad(exchanged, (q, k)), strict=True
    )
    for grad, exchanged_grad in grads:
        torch.testing.assert_close(grad, exchanged_grad)


def test_equal_pairs_give_log_n() -> None:
    loss = infonce_loss(torch.ones(70, 8), torch.ones(70, 8), symmetric=True, reduction="none")
    torch.testing.assert_close(loss, torch.full((70,), 70.0).log())


# --- each option alone decides the loss ---------------------------------------------------------


def row_rival() -> dict[str, Any]:
    """Query 0 prefers key 3, which is a negative of the rows alone, by 54 / τ."""
    query, keys = torch.eye(4)[:3] * 3, torch.eye(4) * 3
    keys[3] = 7 * keys[0]
    return {"query": query, "keys": keys}


def column_rival() -> dict[str, Any]:
    """Key 0 prefers query 1 by 50 / τ; query 1 prefers its own key."""
    query, keys = torch.eye(4)[:3] * 9, torch.eye(4)
    query[1, 0], query[1, 1] = 59.0, 99.0
    return {"query": query, "keys": keys}


@pytest.mark.parametrize(
    "option",
    [
        {"log_q": torch.tensor([0.0, 0.0, 0.0, torch.inf])},
        {"log_q": torch.tensor([0.0, 0.0, 0.0, 90.0])},
        {"key_ids": torch.tensor([BIG * 2 + 7, BIG + 7, 7, BIG * 2 + 7])},
        {
            "query_ids": torch.tensor([BIG * 2 + 7, 8, 9]),
            "key_query_ids": torch.tensor([1, BIG + 7, 7, BIG * 2 + 7]),
        },
        {"self_index": torch.tensor([3, -1, -1])},
        {"log_q_positive": torch.tensor([-90.0, 0.0, 0.0])},
        {"key_bias": torch.tensor([0.0, 0.0, 0.0, -90.0])},
        {"temperature": torch.tensor(1000.0)},
    ],
    ids=lambda option: "+".join(option),
)
def test_one_option_decides_the_row_loss(option: dict[str, Any]) -> None:
    without = infonce_loss(**row_rival(), symmetric=True, reduction="none")[0]
    with_option = infonce_loss(**row_rival(), **option, symmetric=True, reduction="none")[0]
    assert without > 24
    assert with_option < 2
    assert_matches_reference(row_rival() | option)


@pytest.mark.parametrize(
    "option",
    [
        {"key_ids": torch.tensor([BIG * 2 + 7, BIG * 2 + 7, 7, BIG + 7])},
        {
            "query_ids": torch.tensor([8, BIG * 2 + 7, 9]),
            "key_query_ids": torch.tensor([BIG * 2 + 7, BIG + 7, 7, 1]),
        },
        {"self_index": torch.tensor([-1, 0, -1])},
        {"temperature": torch.tensor(1000.0)},
        {"row_weight": torch.tensor([1.0, 0.0, 1.0])},
    ],
    ids=lambda option: "+".join(option),
)
def test_one_option_decides_the_column_loss(option: dict[str, Any]) -> None:
    without = infonce_loss(**column_rival(), symmetric=True, reduction="none")[0]
    with_option = infonce_loss(**column_rival(), **option, symmetric=True, reduction="none")[0]
    assert without > 24
    assert with_option < 2
    assert_matches_reference(column_rival() | option)


@pytest.mark.parametrize(
    "option",
    [
        {"log_q": torch.tensor([torch.inf, torch.inf, 0.0, 0.0])},
        {"log_q_positive": torch.tensor([-90.0, 0.0, 0.0])},
        {"key_bias": torch.tensor([90.0, 0.0, 0.0, 0.0])},
    ],
    ids=lambda option: "+".join(option),
)
def test_the_columns_know_no_correction(option: dict[str, Any]) -> None:
    loss = infonce_loss(**column_rival(), **option, symmetric=True, reduction="none")[0]
    assert loss > 24
    assert_matches_reference(column_rival() | option)


def test_keys_past_the_pairs_are_negatives_of_the_rows_alone() -> None:
    problem = pairs(6, 9, 8)
    q, k = problem["query"], problem["keys"]
    rows, columns = infonce_loss_rows(q, k), infonce_loss_rows(k[:6], q)
    loss = infonce_loss(q, k, symmetric=True, reduction="none")
    torch.testing.assert_close(loss.double(), (rows + columns) / 2, rtol=1e-5, atol=1e-5)


def test_the_diagonal_is_never_masked() -> None:
    q, k = torch.randn(5, 8), torch.randn(5, 8)
    everything = torch.zeros(5, dtype=torch.long)
    masks: list[dict[str, Tensor]] = [{"key_ids": everything}, {"query_ids": everything}]
    for mask in masks:
        options = mask | {"self_index": torch.arange(5)}
        assert infonce_loss(q, k, **options, symmetric=True) == 0


# --- weights and reductions ---------------------------------------------------------------------


def test_reductions_weigh_the_pairs() -> None:
    problem = pairs(9, 20, 8)
    weight = torch.tensor([0.0, 1, 2, 0, 0.5, 3, 1, 1, 0])
    rows = infonce_symmetric_rows(**problem, row_weight=weight).float() * weight
    loss = {
        r: infonce_loss(**problem, row_weight=weight, symmetric=True, reduction=r)
        for r in ("none", "sum", "mean")
    }
    torch.testing.assert_close(loss["none"], rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss["sum"], rows.sum())
    torch.testing.assert_close(loss["mean"], rows.sum() / weight.sum())
    unweighted = infonce_symmetric_rows(**problem).float().mean()
    torch.testing.assert_close(infonce_loss(**problem, symmetric=True), unweighted)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38])
def test_a_pair_of_weight_zero_takes_part_in_nothing(bad: float) -> None:
    """It is the loss of the other pairs, to which its key is one more negative of the rows."""
    problem = pairs(4, 30, 8) | {"temperature": torch.tensor(0.5)}
    order = torch.tensor([0, 1, 3, 2, *range(4, 30)])
    clean, clean_leaves = with_leaves(
        problem | {"query": problem["query"][[0, 1, 3]], "keys": problem["keys"][order]}
    )
    problem["query"][2] = bad
    problem, leaves = with_leaves(problem)
    weight = torch.tensor([1.0, 1, 0, 1])
    loss = infonce_loss(**problem, row_weight=weight, symmetric=True)
    clean_loss = infonce_loss(**clean, symmetric=True)
    torch.testing.assert_close(loss, clean_loss)
    grad_query, grad_keys, grad_temperature = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(clean_loss, clean_leaves)
    assert torch.equal(grad_query[2], torch.zeros(8))
    torch.testing.assert_close(grad_query[[0, 1, 3]], expected[0])
    torch.testing.assert_close(grad_keys[order], expected[1])
    torch.testing.assert_close(grad_temperature, expected[2])


def test_weights_that_sum_to_zero_give_zero() -> None:
    problem = pairs(4, 6, 8)
    query = problem["query"].requires_grad_()
    loss = infonce_loss(**problem, row_weight=torch.zeros(4), symmetric=True)
    assert loss == 0
    assert torch.count_nonzero(torch.autograd.grad(loss, query)[0]) == 0


def test_an_empty_batch_gives_zero() -> None:
    assert infonce_loss(torch.ones(0, 8), torch.ones(5, 8), symmetric=True) == 0


# --- dtypes and derivatives ---------------------------------------------------------------------


@pytest.mark.cpu_only
@pytest.mark.parametrize("keys_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype: torch.dtype, keys_dtype: torch.dtype) -> None:
    problem = pairs(200, 300, 64) | {"temperature": torch.tensor(0.5)}
    problem["query"], problem["keys"] = problem["query"].to(dtype), problem["keys"].to(keys_dtype)
    problem, leaves = with_leaves(problem)
    wide, wide_leaves = with_leaves(
        problem | {n: problem[n].detach().float() for n in ("query", "keys")}
    )
    loss, expected = (infonce_loss(**p, symmetric=True) for p in (problem, wide))
    assert torch.equal(loss, expected)
    grads = torch.autograd.grad(loss, leaves)
    expected_grads = torch.autograd.grad(expected, wide_leaves)
    for grad, expected_grad, leaf in zip(grads, expected_grads, leaves, strict=True):
        assert torch.equal(grad, expected_grad.to(leaf.dtype))


@pytest.mark.cpu_only
def test_gradcheck_with_every_option() -> None:
    problem = pairs(5, 9, 3, dtype=torch.float64) | every_option(5, 9)
    leaves = [problem[n].double().requires_grad_() for n in LEAVES]

    def loss(*values: Tensor) -> Tensor:
        values_of = dict(zip(LEAVES, values, strict=True))
        return infonce_loss(**(problem | values_of), symmetric=True, reduction="none")

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("of", ["query", "keys"])
def test_second_derivative_is_refused(of: str) -> None:
    problem = pairs(3, 5, 8)
    leaf = problem[of].requires_grad_()
    loss = infonce_loss(**problem, symmetric=True)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (grad + leaf).sum().backward()


# --- torch.library, torch.compile, threads, strides ---------------------------------------------


def op_arguments(options: dict[str, Any]) -> list[Any]:
    problem, _ = with_leaves(pairs(6, 9, 4) | options)
    order = ["query", "keys", "row_weight", "temperature", "log_q", "key_ids", "query_ids"]
    order += ["key_query_ids", "self_index", "log_q_positive", "key_bias"]
    return [problem.get(name) for name in order]


@pytest.mark.parametrize(
    "options", [every_option(6, 9), {"temperature": torch.tensor(0.5)}], ids=["all", "none"]
)
def test_opcheck(options: dict[str, Any]) -> None:
    ops = torch.ops.torchrec_pt
    arguments = op_arguments(options)
    torch.library.opcheck(ops.infonce_symmetric_forward.default, arguments)
    values = [None if a is None else a.detach() for a in arguments]
    _, lse, column_lse, _ = ops.infonce_symmetric_forward(*values)
    torch.library.opcheck(
        ops.infonce_symmetric_backward.default, (torch.rand(6), lse, column_lse, *values)
    )


def test_compiles_to_one_graph() -> None:
    problem, leaves = with_leaves(pairs(20, 30, 8) | every_option(20, 30))
    compiled = torch.compile(infonce_loss, fullgraph=True, backend="aot_eager")
    ours, eager = (f(**problem, symmetric=True) for f in (compiled, infonce_loss))
    torch.testing.assert_close(ours, eager)
    grads = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True)
    for compiled_grad, eager_grad in grads:
        torch.testing.assert_close(compiled_grad, eager_grad)


def test_strides_do_not_matter() -> None:
    q, k = torch.randn(16, 70).T, torch.randn(200, 40)[::2, ::2][:, :16]
    options = {
        "key_ids": torch.arange(200)[::2] // 3,
        "key_bias": torch.randn(()).expand(100),
        "row_weight": torch.rand(140)[::2],
    }
    loss = infonce_loss(q, k, **options, symmetric=True)
    dense = {name: value.contiguous() for name, value in options.items()}
    same = infonce_loss(q.contiguous(), k.contiguous(), **dense, symmetric=True)
    torch.testing.assert_close(loss, same)


def test_bits_do_not_depend_on_the_thread_count() -> None:
    problem, leaves = with_leaves(pairs(600, 2100, 48) | every_option(600, 2100))

    assert_same_bits_on_two_threads(lambda: infonce_loss(**problem, symmetric=True), leaves)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.tensor([0, 1, 2])}, "symmetric takes no target"),
        ({"keys": torch.ones(2, 8)}, "symmetric needs a key for each query, got 3 queries and 2"),
        ({"row_weight": torch.ones(5)}, r"row_weight must have shape \(3,\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"key_query_ids": torch.ones(5).long()}, "query_ids and key_query_ids go together"),
        ({"log_q": torch.ones(3)}, r"log_q must have shape \(5,\)"),
        ({"query": torch.ones(3, 8, dtype=torch.float64)}, "float64 query and keys go together"),
    ],
)
def test_rejects_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"query": torch.ones(3, 8), "keys": torch.ones(5, 8)}
    with pytest.raises(ValueError, match=f"^infonce: {message}"):
        infonce_loss(**(good | change), symmetric=True)
