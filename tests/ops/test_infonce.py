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
from torchrec_pt.ops import infonce, infonce_logsumexp, infonce_loss
from torchrec_pt.ops.reference import infonce_logits, infonce_loss_rows

SHAPES = [
    (0, 5, 8),
    (1, 1, 8),
    (2, 2, 24),
    (63, 63, 8),
    (65, 250, 31),
    (130, 65, 64),
    (3, 1000, 24),
    (257, 1025, 96),
    (5, 2500, 256),
]
DIMS = [32, 40, 64, 100, 128, 256]  # on both sides of what a GPU's tiles are padded to
BIG = 2**31  # ids above it must be told apart, also from their low 32 bits


def make(num_rows: int, num_keys: int, dim: int, seed: int = 0, **like: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "query": torch.randn(num_rows, dim, generator=generator, **like),
        "keys": torch.randn(num_keys, dim, generator=generator, **like),
        "target": torch.randint(num_keys, (num_rows,), generator=generator),
    }


def all_options(num_rows: int, num_keys: int, seed: int = 1) -> dict[str, Tensor]:
    """Every option at once, with many collisions of ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = [BIG * 4 + 7, BIG * 2 + 7, 7, BIG - 1, -3]

    def draw_ids(size: int) -> Tensor:
        return torch.tensor(ids)[torch.randint(len(ids), (size,), generator=generator)]

    log_q = torch.randn(num_keys, generator=generator)
    log_q[::7] = torch.inf
    return {
        "temperature": torch.tensor(0.3),
        "log_q": log_q,
        "key_ids": draw_ids(num_keys),
        "query_ids": draw_ids(num_rows),
        "key_query_ids": draw_ids(num_keys),
        "self_index": torch.randint(-1, num_keys + 1, (num_rows,), generator=generator),
        "log_q_positive": torch.randn(num_rows, generator=generator),
        "key_bias": torch.randn(num_keys, generator=generator),
    }


def of_one_size(problem: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The problem with logits, and so their rounding, of about one size at every dim."""
    scaled = {name: problem[name] / problem[name].shape[1] ** 0.25 for name in ("query", "keys")}
    return problem | {name: vectors.to(dtype) for name, vectors in scaled.items()}


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [grad.double() for grad in torch.autograd.grad(loss, inputs)]


def rounding(problem: dict[str, Any], largest_logit: float) -> float:
    """A bound of what float32 leaves in a gradient, whatever its own size.

    p = exp(s − lse) carries the rounding of lse, 6e-8 of its size, and a gradient multiplies it by
    a query or a key, over τ.
    """
    vectors = [problem[name].detach().abs().max().item() for name in ("query", "keys")]
    reach = max(vectors) / torch.as_tensor(problem.get("temperature", 1.0)).item()
    return 2e-7 * largest_logit * max(1.0, reach)


def assert_matches_reference(problem: dict[str, Any], rtol: float = 1e-5) -> None:
    """Losses, and the gradients under an arbitrary upstream (bound: 10 × rtol)."""
    names = [n for n in ("query", "keys", "temperature", "key_bias") if n in problem]
    problem = problem | {n: problem[n].clone().requires_grad_() for n in names}
    inputs = [problem[n] for n in names]
    num_rows = problem["query"].shape[0]
    loss = infonce_loss(**problem, reduction="none")
    expected = infonce_loss_rows(**problem)
    # A loss is a difference of logits: its error is relative to the larger of them.
    scale = 1 + infonce_logits(**problem).detach().nan_to_num(neginf=0).abs().amax(1)
    assert ((loss - expected).abs() <= rtol * scale).all()
    upstream = torch.linspace(-1, 2, num_rows)
    theirs = gradients((expected * upstream).sum(), inputs)
    # Any upstream (four products), and the same as weights of a sum (three).
    total = infonce_loss(**problem, row_weight=upstream, reduction="sum")
    assert (total - (expected * upstream).sum()).abs() <= rtol * (upstream.abs() * scale).sum()
    for ours in (gradients((loss * upstream).sum(), inputs), gradients(total, inputs)):
        for name, grad, expected_grad in zip(names, ours, theirs, strict=True):
            largest = expected_grad.abs().max().item() if expected_grad.numel() else 0.0
            atol = 10 * rtol * largest + rounding(problem, scale.max().item()) if num_rows else 0
            torch.testing.assert_close(grad, expected_grad, rtol=10 * rtol, atol=atol, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_reference(shape: tuple[int, int, int]) -> None:
    assert_matches_reference(make(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_reference_with_every_option(shape: tuple[int, int, int]) -> None:
    assert_matches_reference(make(*shape) | all_options(*shape[:2]))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("num_rows", "num_keys"), [(67, 201), (131, 65)])
def test_matches_reference_at_every_dim(num_rows: int, num_keys: int, dim: int) -> None:
    problem = of_one_size(make(num_rows, num_keys, dim))
    assert_matches_reference(problem | all_options(num_rows, num_keys))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1000.0])
def test_matches_reference_at_every_scale(scale: float) -> None:
    problem = make(40, 1100, 16)
    problem["query"] *= scale
    problem["query"][3] *= 100  # one row of a huge norm
    # float32 rounds a logit of size s by s·6e-8, which exp turns into a relative error.
    assert_matches_reference(problem, rtol=1e-5 * max(1.0, scale / 10))


@pytest.mark.parametrize("offset", [2**24, 2**31, 2**53])
def test_neighbouring_large_ids_are_told_apart(offset: int) -> None:
    """Each pair would be one id in float32 (above 2^24), int32 or float64 (above 2^53)."""
    problem = make(8, 8, 4)
    ids = offset + torch.arange(8)
    masks: list[dict[str, Tensor]] = [{"key_ids": ids}, {"query_ids": ids, "key_query_ids": ids}]
    for mask in masks:
        for symmetric in (False, True):
            given = {"query": problem["query"], "keys": problem["keys"], "symmetric": symmetric}
            unmasked = infonce_loss(**given)
            assert torch.equal(infonce_loss(**given, **mask), unmasked)


def test_equal_rows_give_log_n() -> None:
    loss = infonce_loss(torch.ones(70, 8), torch.ones(70, 8), reduction="none")
    torch.testing.assert_close(loss, torch.full((70,), 70.0).log())


def test_target_defaults_to_the_diagonal() -> None:
    q, k = torch.randn(50, 8), torch.randn(60, 8)
    assert torch.equal(infonce_loss(q, k), infonce_loss(q, k, torch.arange(50)))


# --- each option alone decides the loss ---------------------------------------------------------


def rival() -> dict[str, Any]:
    """Row 0 prefers key 1 to its target 0 by 50 / τ, so masking key 1 changes everything."""
    keys = torch.eye(4)
    query = torch.tensor([[0.0, 50.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    return {"query": query, "keys": keys, "target": torch.tensor([0, 3])}


@pytest.mark.parametrize(
    "option",
    [
        {"log_q": torch.tensor([0.0, torch.inf, 0.0, 0.0])},
        {"log_q": torch.tensor([0.0, 90.0, 0.0, 0.0])},
        {"key_ids": torch.tensor([BIG * 2 + 7, BIG * 2 + 7, 7, BIG + 7])},
        {
            "query_ids": torch.tensor([BIG * 2 + 7, 8]),
            "key_query_ids": torch.tensor([1, BIG * 2 + 7, 7, BIG + 7]),
        },
        {"self_index": torch.tensor([1, -1])},
        {"log_q_positive": torch.tensor([-90.0, 0.0])},
        {"key_bias": torch.tensor([0.0, -90.0, 0.0, 0.0])},
        {"temperature": torch.tensor(1000.0)},
    ],
    ids=lambda option: "+".join(option),
)
def test_one_option_decides_the_loss(option: dict[str, Any]) -> None:
    without = infonce_loss(**rival(), reduction="none")[0]
    with_option = infonce_loss(**rival(), **option, reduction="none")[0]
    assert without > 49
    assert with_option < 2
    assert_matches_reference(rival() | option)


def test_key_query_ids_default_to_query_ids_when_square() -> None:
    q, k, ids = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([1, 2, 1, 3, 3, 1])
    expected = infonce_loss(q, k, query_ids=ids, key_query_ids=ids)
    assert torch.equal(infonce_loss(q, k, query_ids=ids), expected)


def test_the_target_is_never_masked() -> None:
    q, k = torch.randn(5, 8), torch.randn(5, 8)
    everything = torch.zeros(5, dtype=torch.long)
    loss = infonce_loss(
        q, k, key_ids=everything, self_index=torch.arange(5), log_q=torch.full((5,), torch.inf)
    )
    assert loss == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.3, 1.0])
def test_a_row_with_nothing_but_its_target_gives_zero_and_no_gradient(
    temperature: float, symmetric: bool
) -> None:
    q, k = torch.randn(70, 40, requires_grad=True), torch.randn(70, 40, requires_grad=True)
    ids = torch.zeros(70, dtype=torch.long)
    options = {"temperature": temperature, "symmetric": symmetric}
    loss = infonce_loss(q, k, query_ids=ids, **options, reduction="none")  # type: ignore[arg-type]
    assert torch.equal(loss, torch.zeros(70))
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(loss.sum(), (q, k)))


def test_a_self_index_outside_the_keys_masks_nothing() -> None:
    q, k = torch.randn(5, 8), torch.randn(6, 8)
    outside = torch.tensor([-1, 6, 2**31, 2**32 + 1, -(2**32) + 2])
    assert torch.equal(infonce_loss(q, k, self_index=outside), infonce_loss(q, k))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_key_shows(bad: float) -> None:
    q, k = torch.randn(3, 8), torch.randn(70, 8)
    k[66] = bad
    for symmetric in (False, True):
        loss = infonce_loss(q, k, symmetric=symmetric, reduction="none")
        assert not torch.isfinite(loss).any()


def test_a_vanishing_upstream_gives_finite_gradients() -> None:
    q, k = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    loss = infonce_loss(q, k, reduction="none")
    (grad,) = torch.autograd.grad(loss, q, torch.full((4,), 1e-42))
    assert torch.isfinite(grad).all()


# --- weights and reductions ---------------------------------------------------------------------


def test_reductions_weigh_the_rows() -> None:
    problem = make(9, 20, 8)
    weight = torch.tensor([0.0, 1, 2, 0, 0.5, 3, 1, 1, 0])
    rows = infonce_loss_rows(**problem).float() * weight
    loss = {r: infonce_loss(**problem, row_weight=weight, reduction=r) for r in ("sum", "mean")}
    torch.testing.assert_close(
        infonce_loss(**problem, row_weight=weight, reduction="none"), rows, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(loss["sum"], rows.sum())
    torch.testing.assert_close(loss["mean"], rows.sum() / weight.sum())
    torch.testing.assert_close(infonce_loss(**problem), infonce_loss_rows(**problem).float().mean())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38])
def test_a_row_of_weight_zero_gives_zero_whatever_it_holds(bad: float) -> None:
    problem = make(4, 30, 8) | {"temperature": torch.tensor(0.5)}
    clean = {n: v[1:] if n in ("query", "target") else v for n, v in problem.items()}
    problem["query"][0] = bad
    leaves = [problem[n].requires_grad_() for n in ("query", "keys", "temperature")]
    loss = infonce_loss(**problem, row_weight=torch.tensor([0.0, 1, 1, 1]))
    loss_clean = infonce_loss(**clean)
    torch.testing.assert_close(loss, loss_clean)
    grad_query, *others = torch.autograd.grad(loss, leaves)
    assert torch.equal(grad_query[0], torch.zeros(8))
    expected = torch.autograd.grad(loss_clean, leaves[1:])
    for grad, expected_grad in zip(others, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_weights_that_sum_to_zero_give_zero() -> None:
    problem = make(4, 6, 8)
    query = problem["query"].requires_grad_()
    loss = infonce_loss(**problem, row_weight=torch.zeros(4))
    assert loss == 0
    assert torch.count_nonzero(torch.autograd.grad(loss, query)[0]) == 0


def test_an_empty_batch_gives_zero() -> None:
    assert infonce_loss(torch.ones(0, 8), torch.ones(5, 8)) == 0


# --- logsumexp ----------------------------------------------------------------------------------


def test_logsumexp_matches_reference_under_any_upstream() -> None:
    problem = make(70, 1500, 24)
    options = all_options(70, 1500)
    del problem["target"], options["key_ids"], options["log_q_positive"]
    problem |= options
    leaves = [problem[n].requires_grad_() for n in ("query", "keys", "key_bias", "temperature")]
    lse, expected = infonce_logsumexp(**problem), infonce_logits(**problem).logsumexp(1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(70)
    ours = gradients(lse @ upstream, leaves)
    theirs = gradients(expected @ upstream.double(), leaves)
    for grad, expected_grad in zip(ours, theirs, strict=True):
        atol = 1e-4 * expected_grad.abs().max().item()
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=atol)


def test_logsumexp_of_parts_merges_by_logaddexp() -> None:
    q, k = torch.randn(7, 8), torch.randn(100, 8)
    merged = torch.logaddexp(infonce_logsumexp(q, k[:30]), infonce_logsumexp(q, k[30:]))
    torch.testing.assert_close(merged, infonce_logsumexp(q, k))


def test_logsumexp_without_an_allowed_key_is_minus_infinity_with_zero_gradient() -> None:
    q, k = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    tau = torch.tensor(0.5, requires_grad=True)
    lse = infonce_logsumexp(q, k, temperature=tau, log_q=torch.full((5,), torch.inf))
    assert torch.equal(lse, torch.full((3,), -torch.inf))
    upstream = torch.tensor([1.0, torch.nan, torch.inf])
    for grad in torch.autograd.grad(lse, (q, k, tau), upstream):
        assert torch.count_nonzero(grad) == 0
    assert torch.equal(infonce_logsumexp(q, torch.ones(0, 8)), lse)


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_near_that_of_pytorch(dtype: torch.dtype, keys_dtype: torch.dtype) -> None:
    problem = make(200, 200, 64)
    q = (problem["query"] / 8).to(dtype).requires_grad_()
    k = (problem["keys"] / 8).to(dtype).to(keys_dtype).requires_grad_()
    target, tau = problem["target"], 0.1
    exact = F.cross_entropy(q.float() @ k.float().T / tau, target)
    theirs = F.cross_entropy((q @ k.to(dtype).T) / tau, target)
    ours = infonce_loss(q, k, target, temperature=tau)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 1e-5
    grads = [torch.autograd.grad(loss, (q, k)) for loss in (exact, theirs, ours)]
    for leaf, expected, pytorch, grad in zip((q, k), *grads, strict=True):
        assert grad.dtype == leaf.dtype
        error = (grad.float() - expected.float()).abs().max()
        assert error <= 3 * (pytorch.float() - expected.float()).abs().max() + 1e-7


# Twice the rounding of the type: of ds, and of the result.
LARGEST_ERRORS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def assert_16_bit_matches_reference(
    ours: Tensor, expected: Tensor, leaves: list[Tensor], dtype: torch.dtype
) -> None:
    upstream = torch.linspace(-1, 2, len(ours))
    # The inputs are exact and the logits float32: only gradients are rounded to 16 bits.
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-4, atol=1e-4)
    grads = gradients((ours * upstream).sum(), leaves)
    for grad, exact in zip(grads, gradients((expected * upstream).sum(), leaves), strict=True):
        assert (grad - exact).abs().max() <= LARGEST_ERRORS[dtype] * exact.abs().max()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_match_reference_with_every_option(dtype: torch.dtype, dim: int) -> None:
    problem = of_one_size(make(131, 201, dim), dtype) | all_options(131, 201)
    leaves = [problem[name].requires_grad_() for name in ("query", "keys")]
    ours = infonce_loss(**problem, reduction="none")
    assert_16_bit_matches_reference(ours, infonce_loss_rows(**problem), leaves, dtype)


def test_16_bit_gradients_keep_small_probabilities() -> None:
    # p of key 1 is 1.5 · 2^-24, which float16 itself would round to a multiple of 2^-24.
    values = torch.tensor([[4.0, 0.0]]), torch.tensor([[16.23 / 4, 0.0], [0.0, 0.0]])
    grads = []
    for dtype in (torch.float16, torch.float32):
        q, k = (value.half().to(dtype).requires_grad_() for value in values)
        (grad,) = torch.autograd.grad(2.0**10 * infonce_loss(q, k, torch.tensor([0])), k)
        grads.append(grad[1, 0].item())
    assert grads[0] == pytest.approx(grads[1], rel=2e-3)


@pytest.mark.cpu_only
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_16_bit_inputs_are_computed_in_float32(reduction: Any) -> None:
    problem = make(60, 700, 24) | all_options(60, 700)
    names = ("query", "keys", "key_bias")
    for dtypes in (
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ):
        values = [problem[n].detach().to(dtype) for n, dtype in zip(names, dtypes, strict=True)]
        runs = []
        for leaves in (values, [value.float() for value in values]):
            leaves = [leaf.requires_grad_() for leaf in leaves]
            given = problem | dict(zip(names, leaves, strict=True))
            loss = infonce_loss(**given, reduction=reduction).sum()
            runs.append([loss, *torch.autograd.grad(loss, leaves)])
        for ours, wide, leaf in zip(*runs, [loss, *values], strict=True):
            assert torch.equal(ours, wide.to(leaf.dtype))


@pytest.mark.cpu_only
def test_logsumexp_of_16_bits_is_computed_in_float32() -> None:
    values = [torch.randn(20, 8), torch.randn(30, 8), torch.randn(30)]
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, bias = (v.bfloat16().to(dtype).requires_grad_() for v in values)
        lse = infonce_logsumexp(q, k, temperature=0.5, key_bias=bias)
        runs.append([lse, *torch.autograd.grad(lse.sum(), (q, k, bias))])
    narrow, wide = runs
    assert torch.equal(narrow[0], wide[0])
    for grad, wide_grad in zip(narrow[1:], wide[1:], strict=True):
        assert torch.equal(grad, wide_grad.bfloat16())


@pytest.mark.parametrize("symmetric", [False, True])
def test_autocast_leaves_the_inputs_as_they_arrive(symmetric: bool) -> None:
    linear = torch.nn.Linear(8, 8)
    x, keys = torch.randn(6, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        query = linear(x)
        mixed = infonce_loss(query, keys, symmetric=symmetric)
        exact = infonce_loss(x, keys, symmetric=symmetric)
    assert query.dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, infonce_loss(query, keys, symmetric=symmetric))
    assert torch.equal(exact, infonce_loss(x, keys, symmetric=symmetric))
    (grad,) = torch.autograd.grad(mixed, linear.weight)
    assert grad.dtype == torch.float32
    assert torch.isfinite(grad).all()


@pytest.mark.cpu_only
def test_gradcheck_with_every_option() -> None:
    problem = make(5, 9, 3, dtype=torch.float64) | all_options(5, 9)
    names = ("query", "keys", "temperature", "key_bias")
    leaves = [problem[n].double().requires_grad_() for n in names]

    def loss(*values: Tensor) -> Tensor:
        weight = torch.tensor([1.0, 0, 2, 3, 0.5])
        return infonce_loss(
            **(problem | dict(zip(names, values, strict=True))), row_weight=weight, reduction="none"
        )

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("of", ["query", "keys"])
def test_second_derivative_is_refused(reduction: Any, of: str) -> None:
    problem = {"query": torch.randn(3, 8), "keys": torch.randn(5, 8)}
    leaf = problem[of].requires_grad_()
    loss = infonce_loss(**problem, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (grad + leaf).sum().backward()


def test_16_bit_gradients_survive_a_small_weight_under_a_large_scale() -> None:
    q, k = torch.randn(4, 8).half().requires_grad_(), torch.randn(6, 8).half()
    scaled = [
        torch.autograd.grad(2.0**16 * infonce_loss(q, k, row_weight=w, reduction="sum"), q)[0]
        for w in (torch.full((4,), 2.0**-22), torch.full((4,), 2.0**-16))
    ]
    torch.testing.assert_close(scaled[0] * 2**6, scaled[1], rtol=2e-3, atol=1e-4)  # float16
    assert (scaled[0] != 0).all()


@pytest.mark.cpu_only
def test_the_way_of_many_keys_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(20, 30, 8) | all_options(20, 30)
    leaves = [problem[n].requires_grad_() for n in ("query", "keys", "temperature", "key_bias")]
    weight = torch.linspace(0, 2, 20)

    def run() -> list[Tensor]:
        loss = infonce_loss(**problem, row_weight=weight)
        return [loss, *torch.autograd.grad(loss, leaves)]

    few = run()
    monkeypatch.setattr(infonce, "_MOST_KEYS_TO_SUM", 29)
    torch.testing.assert_close(run(), few)


# --- torch.library, torch.compile, threads, strides, memory -------------------------------------


def op_arguments(**overrides: Any) -> list[Any]:
    problem: dict[str, Any] = make(6, 9, 4) | all_options(6, 9) | overrides
    for name in ("query", "keys", "temperature", "key_bias"):
        if problem[name] is not None:
            problem[name].requires_grad_()
    order = ["query", "keys", "target", "temperature", "log_q", "key_ids", "query_ids"]
    order += ["key_query_ids", "self_index", "log_q_positive", "key_bias"]
    return [problem[name] for name in order]


def test_opcheck() -> None:
    op = torch.ops.torchrec_pt.infonce_forward.default
    nothing = dict.fromkeys(all_options(6, 9)) | {"temperature": torch.tensor(0.5)}
    for arguments in (
        op_arguments(),
        op_arguments(**nothing),
        op_arguments(**nothing, target=None),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.cpu_only
def test_opcheck_of_the_sum() -> None:
    op = torch.ops.torchrec_pt.infonce_sum.default
    nothing = dict.fromkeys(all_options(6, 9)) | {"temperature": torch.tensor(0.5)}
    for arguments in (op_arguments(), op_arguments(**nothing)):
        torch.library.opcheck(op, (torch.rand(6), *arguments))


def test_compiles_to_one_graph() -> None:
    problem = make(20, 30, 8) | all_options(20, 30)
    leaves = [problem[n].requires_grad_() for n in ("query", "keys", "temperature", "key_bias")]
    weight = torch.rand(20)
    compiled = torch.compile(infonce_loss, fullgraph=True, backend="aot_eager")
    ours = compiled(**problem, row_weight=weight)
    eager = infonce_loss(**problem, row_weight=weight)
    torch.testing.assert_close(ours, eager)
    grads = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True)
    for compiled_grad, eager_grad in grads:
        torch.testing.assert_close(compiled_grad, eager_grad)


class Objective(torch.nn.Module):
    def __init__(self, symmetric: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.symmetric = symmetric

    def forward(self, x: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
        return infonce_loss(
            self.linear(x), keys, temperature=0.1, key_ids=ids, symmetric=self.symmetric
        )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_exports(symmetric: bool, strict: bool) -> None:
    module = Objective(symmetric)
    arguments = (torch.randn(6, 8), torch.randn(9, 8), torch.arange(9) // 2)
    exported = torch.export.export(module, arguments, strict=strict)
    assert torch.equal(exported.module()(*arguments), module(*arguments))


def test_a_float_temperature_compiles() -> None:
    problem = make(4, 6, 8)
    compiled = torch.compile(infonce_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(**problem, temperature=0.2), infonce_loss(**problem, temperature=0.2)
    )


def test_strides_do_not_matter() -> None:
    q, k = torch.randn(16, 70).T, torch.randn(200, 40)[::2, ::2][:, :16]
    ids = torch.arange(200)[::2] // 3
    target = (torch.arange(140) % 100)[::2]
    loss = infonce_loss(q, k, target, key_ids=ids, key_bias=torch.randn(()).expand(100))
    same = infonce_loss(
        q.contiguous(), k.contiguous(), target.contiguous(), key_ids=ids.contiguous()
    )
    torch.testing.assert_close(loss, same)


def assert_same_bits_on_two_threads(loss_of: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    def run() -> list[Tensor]:
        loss = loss_of()
        return [loss, *torch.autograd.grad(loss, leaves)]

    assert_same_bits(run, [2], by_blas=True)


def test_bits_do_not_depend_on_the_thread_count() -> None:
    problem = make(300, 2100, 48) | all_options(300, 2100)
    leaves = [problem[n].requires_grad_() for n in ("query", "keys", "key_bias", "temperature")]

    assert_same_bits_on_two_threads(lambda: infonce_loss(**problem), leaves)


MEMORY_PROBE = """
import sys
import torch
from torchrec_pt.ops import infonce_loss

torch.set_num_threads(1)

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

def step(num_rows):
    q, k = (torch.randn(num_rows, 128, requires_grad=True) for _ in range(2))
    before_mib = status("VmRSS")
    infonce_loss(q, k, temperature=0.1, symmetric=sys.argv[1] == "symmetric").backward()
    gradients_mib = sum(x.grad.nbytes for x in (q, k)) / 2**20
    return status("VmHWM") - before_mib - gradients_mib

step(256)  # loads the code of the BLAS; the buffers that it grows later are counted
print(step(16384))
"""


@pytest.mark.cpu_only
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("direction", ["one", "symmetric"])
def test_memory_is_linear_in_the_batch(direction: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, direction], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) <= 32  # MiB beyond the gradients; the logits would be 1024


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(3, 7)}, r"query must be \(B, D\) and keys \(N, D\)"),
        ({"query": torch.ones(3)}, r"query must be \(B, D\)"),
        ({"query": torch.ones(3, 8, dtype=torch.long)}, "query and keys must be float32"),
        ({"query": torch.ones(3, 8, dtype=torch.float64)}, "float64 query and keys go together"),
        # CUDA tells of these by an assertion on the device.
        pytest.param(
            {"target": torch.tensor([0, 1, 5])},
            r"target must be in \[0, N\) with N = 5, got 5",
            marks=pytest.mark.cpu_only,
        ),
        pytest.param(
            {"target": torch.tensor([-1, 1, 2])},
            r"target must be in \[0, N\)",
            marks=pytest.mark.cpu_only,
        ),
        ({"target": torch.tensor([0, 1])}, r"target must have shape \(3,\)"),
        ({"target": torch.tensor([0, 1, 2]).int()}, "target must be int64"),
        ({"keys": torch.ones(0, 8)}, r"target must be in \[0, N\) with N = 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"temperature": torch.ones(1)}, "temperature must be a float or a 0-dim"),
        ({"log_q": torch.ones(3)}, r"log_q must have shape \(5,\)"),
        ({"log_q": torch.ones(5).long()}, "log_q must be floating point"),
        ({"key_ids": torch.ones(5)}, "key_ids must be int64"),
        ({"query_ids": torch.ones(3).long()}, "query_ids and key_query_ids go together"),
        ({"key_query_ids": torch.ones(5).long()}, "query_ids and key_query_ids go together"),
        ({"self_index": torch.ones(5).long()}, r"self_index must have shape \(3,\)"),
        ({"log_q_positive": torch.ones(5)}, r"log_q_positive must have shape \(3,\)"),
        ({"key_bias": torch.ones(3)}, r"key_bias must have shape \(5,\)"),
        ({"row_weight": torch.ones(5)}, r"row_weight must have shape \(3,\)"),
        ({"reduction": "avg"}, 'reduction must be "none", "mean" or "sum"'),
    ],
)
def test_rejects_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"query": torch.ones(3, 8), "keys": torch.ones(5, 8)}
    with pytest.raises(ValueError, match=f"^infonce: {message}"):
        infonce_loss(**(good | change))
