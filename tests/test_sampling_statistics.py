"""What the sampler's draws are distributed like, and what the corrections make of them.

Each statistic is shown to reject a wrong hypothesis: another distribution, another exponent, a
sequence beside itself, draws without their correction. Seeds are fixed, so a test passes always or
never; BOUND is where a right sampler's statistic lies once in a million seeds (once in a hundred
thousand where the pairs of a lag overlap).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.negatives import InBatch, Named, Sampled, join_keys, sample_beside
from torchrec_pt.ops import NegativeSampler, infonce_loss, sampled_softmax_loss

NUM_ITEMS = 60
COUNTS = (3000 / torch.arange(1, NUM_ITEMS + 1)).ceil()
DISTRIBUTIONS = ("uniform", "log_uniform", "unigram")
# Standard normal quantile of 10^-6.
BOUND = 4.75


def build(distribution: str, num: int, seed: int = 0, num_items: int = NUM_ITEMS) -> Any:
    counts = COUNTS[:num_items] if distribution == "unigram" else None
    return NegativeSampler(
        num_items, num, distribution=distribution, counts=counts, alpha=0.75, seed=seed
    )


def probabilities(distribution: str, alpha: float = 0.75) -> Tensor:
    index = torch.arange(1, NUM_ITEMS + 1).double()
    weights = {
        "uniform": torch.ones_like(index),
        "log_uniform": torch.log1p(1 / index),
        "unigram": COUNTS.double() ** alpha,
    }[distribution]
    return weights / weights.sum()


def chi_square_z(observed: Tensor, expected: Tensor) -> float:
    """Pearson's statistic as a standard normal deviate (Wilson and Hilferty 1931)."""
    assert expected.min() > 5
    df = observed.numel() - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * df)
    return float(((statistic / df) ** (1 / 3) - (1 - spread)) / spread**0.5)


def z_of(ids: Tensor, share: Tensor) -> float:
    observed = torch.bincount(ids.flatten(), minlength=len(share)).double()
    return chi_square_z(observed, share * ids.numel())


# --- distributions ------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_follow_the_distribution(distribution: str, seed: int) -> None:
    ids = build(distribution, 256, seed).sample(2000, step=seed).ids
    assert abs(z_of(ids, probabilities(distribution))) < BOUND
    others = [other for other in DISTRIBUTIONS if other != distribution]
    assert all(z_of(ids, probabilities(other)) > 100 for other in others)


def test_the_exponent_of_unigram_is_seen() -> None:
    ids = build("unigram", 256).sample(2000, step=0).ids
    assert z_of(ids, probabilities("unigram", alpha=0.73)) > 10


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_with_exclusions_follow_the_distribution_of_the_rest(distribution: str) -> None:
    excluded = torch.tensor([0, 1, 2, 7, 30])
    rows = 2000
    exclude = Jagged.from_lengths(excluded.repeat(rows), torch.full((rows,), len(excluded)))
    ids = build(distribution, 256).sample(rows, step=0, exclude=exclude).ids
    is_left = ~torch.isin(torch.arange(NUM_ITEMS), excluded)
    share = probabilities(distribution)[is_left]
    place = is_left.cumsum(0) - 1
    assert abs(z_of(place[ids], share / share.sum())) < BOUND


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_what_hardly_anything_is_left_of_is_drawn_as_it_should(distribution: str) -> None:
    """All but five unlike items, with gaps unlike, of 5000; half of the draws find them by mass."""
    num_items, left = 5000, torch.tensor([990, 991, 1100, 4000, 4999])
    counts = 1e7 / torch.arange(1, num_items + 1).double() ** 2
    sampler = NegativeSampler(
        num_items,
        600,
        distribution=distribution,  # type: ignore[arg-type]
        counts=counts if distribution == "unigram" else None,
        alpha=1,
    )
    excluded = torch.ones(num_items, dtype=torch.bool).index_fill(0, left, False).nonzero()[:, 0]
    exclude = Jagged(excluded, torch.tensor([0, len(excluded)]))
    ids, log_q = sampler.sample(1, step=0, exclude=exclude)
    share = sampler.log_q(left).double().softmax(0)
    place = torch.searchsorted(left, ids)
    assert torch.equal(left[place], ids)
    assert abs(z_of(place, share)) < BOUND
    torch.testing.assert_close(log_q.double(), (600 * share[place]).log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_shared_draws_follow_the_distribution(distribution: str) -> None:
    sampler = build(distribution, 256)
    ids = torch.cat([sampler.sample_shared(step=step).ids for step in range(500)])
    assert abs(z_of(ids, probabilities(distribution))) < BOUND


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_unique_draws_come_as_often_as_log_q_says(distribution: str) -> None:
    """Over the steps; the number of tries, and so log_q, differs from step to step."""
    sampler, num_steps = build(distribution, 20), 3000
    came, expected = torch.zeros(NUM_ITEMS), torch.zeros(NUM_ITEMS)
    share = probabilities(distribution)
    for step in range(num_steps):
        drawn = sampler.sample_shared(step=step, unique=True)
        came[drawn.ids] += 1
        # All drawn items tell the same number of tries, from which follow the others' counts.
        tries = torch.log1p(-drawn.log_q[0].double().exp()) / torch.log1p(-share[drawn.ids[0]])
        expected += -torch.expm1(tries * torch.log1p(-share)).float()
    torch.testing.assert_close(came.sum(), torch.tensor(20.0 * num_steps))
    # The expected count ignores that the draws stop at the 20th distinct item: candidate
    # sampling's known approximation. With replacement it would be M q, far off.
    error = (came - expected).abs() / num_steps
    assert error.max() < 0.03
    assert ((came / num_steps - 20 * share).abs()).max() > 0.1 or distribution == "uniform"


# --- independence -------------------------------------------------------------------------------


def dependence_z(a: Tensor, b: Tensor, num_groups: int = 10) -> float:
    """Pearson's test that pairs (a_i, b_i) of uniform ids fall into all cells alike."""
    a, b = (ids.flatten() * num_groups // NUM_ITEMS for ids in (a, b))
    observed = torch.bincount(a * num_groups + b, minlength=num_groups**2).double()
    return chi_square_z(observed, torch.full_like(observed, a.numel() / num_groups**2))


@pytest.mark.parametrize("lag", [1, 2, 4, 1000])
def test_rows_are_independent(lag: int) -> None:
    ids = build("uniform", 64).sample(4000, step=3).ids
    assert abs(dependence_z(ids[:-lag], ids[lag:])) < BOUND
    assert dependence_z(ids, ids) > 100


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64])
def test_draws_of_a_row_are_independent(lag: int) -> None:
    ids = build("uniform", 128).sample(2000, step=3).ids
    assert abs(dependence_z(ids[:, :-lag], ids[:, lag:])) < BOUND


@pytest.mark.parametrize("lag", [1, 2, 2**16])
def test_steps_are_independent(lag: int) -> None:
    sampler = build("uniform", 64)
    now, later = (sampler.sample(4000, step=step).ids for step in (5, 5 + lag))
    assert abs(dependence_z(now, later)) < BOUND


@pytest.mark.parametrize("seed", [1, 2, 2**31])
def test_seeds_are_independent(seed: int) -> None:
    one, other = (build("uniform", 64, s).sample(4000, step=5).ids for s in (0, seed))
    assert abs(dependence_z(one, other)) < BOUND


def test_redrawn_items_are_independent_of_the_others() -> None:
    """Every item but two is excluded, so that nearly all draws are made again and again."""
    num_rows = 3000
    excluded = torch.arange(NUM_ITEMS)[(torch.arange(NUM_ITEMS) % 30) != 0]
    exclude = Jagged.from_lengths(excluded.repeat(num_rows), torch.full((num_rows,), len(excluded)))
    ids = build("uniform", 64).sample(num_rows, step=0, exclude=exclude).ids
    for a, b in [(ids[:-1], ids[1:]), (ids[:, :-1], ids[:, 1:]), (ids[:, :-4], ids[:, 4:])]:
        assert abs(dependence_z(a, b, num_groups=2)) < BOUND


# --- what the corrections are for ---------------------------------------------------------------

POSITIVE = 3
NUM_TRIALS = 20_000


class Trial:
    """One query against NUM_ITEMS items; gradients of its loss with respect to the query."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.items = torch.randn(NUM_ITEMS, 8, generator=generator)
        self.query = torch.randn(8, generator=generator) / 2
        leaf = self.query.clone().requires_grad_()
        loss = F.cross_entropy((self.items @ leaf)[None], torch.tensor([POSITIVE]))
        (self.full,) = torch.autograd.grad(loss, leaf)

    def bias(self, negatives: Tensor, **log_q: Tensor) -> float:
        """How far the mean over trials (R, M) lies from the full softmax's, relative to that."""
        num_rows = len(negatives)
        query = self.query.expand(num_rows, -1).clone().requires_grad_()
        positive = torch.full((num_rows,), POSITIVE)
        loss = sampled_softmax_loss(query, self.items, positive, negatives, **log_q)
        (grad,) = torch.autograd.grad(loss, query)
        return float((grad.sum(0) - self.full).norm() / self.full.norm())


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial()


def slope(sizes: list[int], biases: list[float]) -> float:
    x, y = torch.tensor(sizes).log(), torch.tensor(biases).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


SIZES = [16, 32, 64, 128, 256]


@pytest.mark.parametrize("distribution", ["log_uniform", "unigram"])
def test_with_log_q_the_bias_falls_as_one_over_the_number_of_negatives(
    trial: Trial, distribution: str
) -> None:
    biases = []
    for num in SIZES:
        drawn = build(distribution, num).sample(NUM_TRIALS, step=num)
        biases.append(trial.bias(drawn.ids, log_q_negatives=drawn.log_q))
    assert -1.3 < slope(SIZES, biases) < -0.7, biases
    assert biases[-1] < 0.03, biases


@pytest.mark.parametrize("distribution", ["log_uniform", "unigram"])
def test_without_log_q_the_bias_stays(trial: Trial, distribution: str) -> None:
    biases = []
    for num in SIZES:
        drawn = build(distribution, num).sample(NUM_TRIALS, step=num)
        uniform = torch.tensor(num / NUM_ITEMS).log().expand(drawn.ids.shape)
        biases.append(trial.bias(drawn.ids, log_q_negatives=uniform))
    assert min(biases[-2:]) > 0.1, biases
    assert abs(slope(SIZES[-3:], biases[-3:])) < 0.3, biases


def test_correcting_the_positive_too_keeps_a_bias(trial: Trial) -> None:
    biases = []
    for num in SIZES:
        sampler = build("unigram", num)
        drawn = sampler.sample(NUM_TRIALS, step=num)
        of_positive = sampler.log_q(torch.full((NUM_TRIALS,), POSITIVE))
        biases.append(
            trial.bias(drawn.ids, log_q_negatives=drawn.log_q, log_q_positive=of_positive)
        )
    # The positive's weight is off by the factor of its own expected count, which grows with M.
    assert min(biases) > 0.04, biases
    assert abs(slope(SIZES[-3:], biases[-3:])) < 0.3, biases


def test_with_exclusions_log_q_estimates_the_sum_over_the_rest(trial: Trial) -> None:
    """Hard negatives beside drawn ones: the hard are certain, the drawn ones none of them."""
    hard = torch.tensor([1, 5, 9])
    named = Jagged.from_lengths(hard.repeat(NUM_TRIALS), torch.full((NUM_TRIALS,), 3))
    biases = []
    for num in SIZES:
        drawn = sample_beside(named, build("unigram", num), NUM_TRIALS, step=num)
        assert drawn.ids.shape == (NUM_TRIALS, 3 + num)
        biases.append(trial.bias(drawn.ids, log_q_negatives=drawn.log_q))
    assert slope(SIZES, biases) < -0.7, biases
    assert biases[-1] < 0.03, biases
    # Drawn without regard to the hard ones, they would be counted twice.
    sampler = build("unigram", 64)
    careless = sampler.sample(NUM_TRIALS, step=64)
    ids = torch.cat([hard.expand(NUM_TRIALS, 3), careless.ids], 1)
    log_q = torch.cat([torch.zeros(NUM_TRIALS, 3), careless.log_q], 1)
    assert trial.bias(ids, log_q_negatives=log_q) > 5 * biases[-1]


@pytest.mark.parametrize("kinds", ["batch", "batch + sampled", "batch + sampled + hard"])
def test_keys_of_several_sources_estimate_the_sum_over_the_catalogue(
    trial: Trial, kinds: str
) -> None:
    """The mean over many batches of the softmax's denominator, each item once."""
    share = COUNTS.double() / COUNTS.sum()
    batches, num_pairs = 4000, 24
    generator = torch.Generator().manual_seed(3)
    ids = torch.multinomial(share, batches * num_pairs, True, generator=generator)
    hard = torch.tensor([1, 1, 5, 9])
    estimates = []
    for step, in_batch in enumerate(ids.split(num_pairs)):
        sampler = build("unigram", 16)
        parts, sources = [in_batch], [InBatch(share.log().float(), torch.tensor(float(num_pairs)))]
        if "sampled" in kinds:
            parts.append(sampler.sample_shared(step=step).ids)
            sources.append(Sampled(sampler))  # type: ignore[arg-type]
        if "hard" in kinds:
            parts.append(hard)
            sources.append(Named(hard))  # type: ignore[arg-type]
        keys = join_keys([(trial.items[part], part) for part in parts], sources)
        assert keys.log_q is not None
        estimates.append((keys.vectors @ trial.query - keys.log_q).exp().sum())
    estimate = torch.stack(estimates)
    exact = (trial.items @ trial.query).exp().sum()
    error = estimate.std() / batches**0.5
    assert abs(estimate.mean() - exact) < BOUND * error
    assert error < 0.02 * exact


@pytest.mark.parametrize("num_rows", [2, 4, 24])
def test_the_other_rows_of_a_batch_estimate_the_sum_over_the_catalogue(
    trial: Trial, num_rows: int
) -> None:
    """Of the first row of many batches, its own key left out."""
    share = COUNTS.double() / COUNTS.sum()
    generator = torch.Generator().manual_seed(3)
    ids = torch.multinomial(share, 20_000 * num_rows, True, generator=generator)
    estimates = {}
    for num_others in (num_rows - 1, num_rows):
        source = InBatch(share.log().float(), torch.tensor(float(num_others)))
        keys = join_keys([(trial.items[ids], ids)], [source])
        assert keys.log_q is not None
        weighed = (keys.vectors @ trial.query - keys.log_q).exp().view(-1, num_rows)
        estimates[num_others] = weighed[:, 1:].sum(1)
    exact = (trial.items @ trial.query).exp().sum()
    right, wrong = estimates[num_rows - 1], estimates[num_rows]
    error = right.std() / len(right) ** 0.5
    assert abs(right.mean() - exact) < BOUND * error
    assert abs(wrong.mean() - exact) > BOUND * error


def test_an_accidental_hit_is_masked_whatever_source_it_comes_from(trial: Trial) -> None:
    share = (COUNTS / COUNTS.sum()).log()
    sampler = build("unigram", 30)
    sampled = sampler.sample_shared(step=0).ids
    in_batch = torch.tensor([0, 1, 0, 2])
    hard = torch.tensor([0, 7])
    assert 0 in sampled
    parts = [(trial.items[ids], ids) for ids in (in_batch, sampled, hard)]
    keys = join_keys(parts, [InBatch(share, torch.tensor(4.0)), Sampled(sampler), Named(hard)])
    query = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    loss = infonce_loss(query, keys.vectors, log_q=keys.log_q, key_ids=keys.ids, reduction="none")
    assert keys.ids is not None
    assert keys.log_q is not None
    for row, item in enumerate(in_batch.tolist()):
        others = keys.ids != item
        logits = (keys.vectors[others] @ query[row]) - keys.log_q[others]
        positive = trial.items[item] @ query[row]
        expected = torch.cat([positive[None], logits]).logsumexp(0) - positive
        torch.testing.assert_close(loss[row], expected)


def test_rows_that_name_different_numbers_of_hard_negatives() -> None:
    named = Jagged.from_lengths(torch.tensor([9, 4, 9, 2]), torch.tensor([3, 0, 1]))
    drawn = sample_beside(named, build("uniform", 5), 3, step=0)
    assert drawn.ids.shape == drawn.log_q.shape == (3, 7)
    assert drawn.ids[0, :2].tolist() == [4, 9]
    assert drawn.log_q[:, :2].tolist() == [[0, 0], [torch.inf, torch.inf], [0, torch.inf]]
    assert torch.equal(
        drawn.ids[:, 2:], build("uniform", 5).sample(3, step=0, exclude=named.to_sets()).ids
    )
