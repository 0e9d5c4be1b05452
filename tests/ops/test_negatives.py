"""NegativeSampler: which ids come out, on every device, and what log_q says of them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.ops import NegativeSampler

COINS = 2**32
WORD = 2**32 - 1
MOST_TRIES = 1024

OPS = torch.ops.torchrec_pt


def zipf_counts(num_items: int) -> Tensor:
    return (1000 / torch.arange(1, num_items + 1)).ceil().long()


def build(distribution: str, num_items: int, num_negatives: int, seed: int = 0) -> NegativeSampler:
    counts = zipf_counts(num_items) if distribution == "unigram" else None
    return NegativeSampler(
        num_items,
        num_negatives,
        distribution=distribution,  # type: ignore[arg-type]
        counts=counts,
        seed=seed,
    )


def exclude_rows(*rows: list[int]) -> Jagged:
    lengths = torch.tensor([len(row) for row in rows])
    return Jagged.from_lengths(
        torch.tensor([item for row in rows for item in row], dtype=torch.int64), lengths
    )


DISTRIBUTIONS = ("uniform", "log_uniform", "unigram")
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


# --- random words -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    # Random123's tests/kat_vectors, "philox4x32 10".
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    counters = torch.tensor([[1, 2, 3, 4], counter])
    assert OPS.philox(counters, torch.tensor(key))[1].tolist() == words


# --- which ids ----------------------------------------------------------------------------------


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    x, y, z, w = counter
    low, high = key
    for _ in range(10):
        product_x, product_z = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y = (product_z >> 32) ^ y ^ low, product_z & WORD
        z, w = (product_x >> 32) ^ w ^ high, product_x & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return x, y, z, w


class Reference:
    """The definition of csrc/negatives/draw.h, one draw at a time."""

    def __init__(self, weights: Tensor | None, num_items: int, seed: int, step: int) -> None:
        self.num_items = num_items
        self.key = (seed, step)
        self.columns: list[list[int]] | None = None
        self.mass = [1] * min(num_items, 4000)  # a larger catalogue never gets that far
        if weights is not None:
            columns, mass = OPS.alias_table(weights.double())
            self.columns = [[c[0] & WORD, c[1] & WORD] for c in columns.tolist()]
            self.mass = mass.tolist()

    def draw(self, row: int, draw: int, excluded: set[int]) -> int:
        for retry in range(MOST_TRIES):
            place = (row, draw // 4, retry)
            product = philox((*place, 0), self.key)[draw % 4] * self.num_items
            if product & WORD < COINS % self.num_items:
                continue
            item = product >> 32
            if self.columns is not None:
                own_coins, alias = self.columns[item]
                item = item if philox((*place, 1), self.key)[draw % 4] < own_coins else alias
            if item not in excluded:
                return item
        left = [0 if i in excluded else self.mass[i] for i in range(self.num_items)]
        word = philox((row, draw // 4, MOST_TRIES, 0), self.key)[draw % 4]
        until = sum(left) * word >> 32
        return next(i for i, mass in enumerate(itertools.accumulate(left)) if mass > until)

    def rows(self, rows: Tensor, num_draws: int, exclude: Jagged | None) -> Tensor:
        ids = []
        for r, row in enumerate(rows.tolist()):
            excluded = set()
            if exclude is not None:
                excluded = set(exclude.values[exclude.offsets[r] : exclude.offsets[r + 1]].tolist())
            ids.append([self.draw(row, draw, excluded) for draw in range(num_draws)])
        return torch.tensor(ids, dtype=torch.int64).reshape(len(rows), num_draws)


def weights_of(distribution: str, num_items: int) -> Tensor | None:
    if distribution == "uniform":
        return None
    if distribution == "log_uniform":
        return torch.log1p(1 / torch.arange(1, num_items + 1).double()).float()
    return (zipf_counts(num_items).double() ** 0.75).float()


@every_distribution
@pytest.mark.parametrize("num_draws", [1, 4, 5, 70])
@pytest.mark.parametrize("num_items", [1, 2, 7, 1000])
def test_ids_are_those_of_the_definition(distribution: str, num_draws: int, num_items: int) -> None:
    rows = torch.tensor([0, 5, 2**31, 2**32 - 1])
    ids, _ = build(distribution, num_items, num_draws, seed=WORD).sample(rows, step=2**31 + 3)
    reference = Reference(weights_of(distribution, num_items), num_items, WORD, 2**31 + 3)
    assert torch.equal(ids, reference.rows(rows, num_draws, None))


@every_distribution
def test_ids_with_exclusions_are_those_of_the_definition(distribution: str) -> None:
    num_items = 12
    exclude = exclude_rows([], [0, 1, 2, 3, 4, 5], [0], list(range(11)), [1, 3, 5, 7, 9, 11])
    rows = torch.arange(5) * 1000
    ids, _ = build(distribution, num_items, 50, seed=3).sample(rows, step=9, exclude=exclude)
    reference = Reference(weights_of(distribution, num_items), num_items, 3, 9)
    assert torch.equal(ids, reference.rows(rows, 50, exclude))


def test_columns_that_are_refused_are_drawn_again() -> None:
    num_items = 1_600_000_000  # 2^32 mod n is a quarter of 2^32
    ids, _ = build("uniform", num_items, 50).sample(3, step=1)
    assert torch.equal(ids, Reference(None, num_items, 0, 1).rows(torch.arange(3), 50, None))


def test_as_many_coins_as_a_column_has_of_its_own_are_its_own() -> None:
    """The column of draw 0 has just one coin too few."""
    ((column_word, *_), (coin, *_)) = (philox((0, 0, 0, stream), (0, 0)) for stream in (0, 1))
    column = column_word * 2 >> 32
    for own_coins, item in [(coin, 1 - column), (coin + 1, column)]:
        as_int32 = own_coins - COINS if own_coins >= COINS // 2 else own_coins
        columns = torch.tensor([[as_int32, 1, 0, 0], [as_int32, 0, 0, 0]], dtype=torch.int32)
        args = (torch.tensor([0]), 1, 2, 0, 0, columns, torch.full((2,), COINS), None, None)
        assert OPS.sample_negatives(*args)[0].item() == item


@every_distribution
def test_the_last_way_out_is_that_of_the_definition(distribution: str) -> None:
    """All but two of 4000 items are excluded: most draws never find them."""
    num_items = 4000
    exclude = exclude_rows([i for i in range(num_items) if i not in (700, 999)])
    ids = build(distribution, num_items, 40).sample(1, step=0, exclude=exclude).ids
    reference = Reference(weights_of(distribution, num_items), num_items, 0, 0)
    assert torch.equal(ids, reference.rows(torch.tensor([0]), 40, exclude))


def test_the_last_way_out_finds_items_that_hardly_ever_come_up() -> None:
    """All mass but two coins is excluded, and the items beside have none."""
    weights = torch.zeros(9).double()
    weights[2], weights[[4, 7]] = 1e12, 1e-9
    columns, mass = OPS.alias_table(weights)
    assert mass[[4, 7]].tolist() == [1, 1]
    offsets = torch.tensor([0, 1])
    args = (torch.tensor([0]), 40, 9, 0, 0, columns, mass, torch.tensor([2]), offsets)
    ids, log_q = OPS.sample_negatives(*args)
    assert ids.unique().tolist() == [4, 7]
    torch.testing.assert_close(log_q.exp(), torch.full((1, 40), 20.0))
    reference = Reference(weights, 9, 0, 0)
    assert ids[0].tolist() == [reference.draw(0, draw, {2}) for draw in range(40)]


GOLDEN = {
    "uniform": "b3f6ce1ff13d3c17",
    "log_uniform": "5699c5f751b21a99",
    "unigram": "a700b38ffbafebf1",
}


def test_ids_stay_what_they_were() -> None:
    """A checkpoint of an older version goes on with the same negatives, on any machine."""
    digests = {
        name: hashlib.sha256(build(name, 5000, 9, seed=1).sample(50, step=2).ids.numpy().tobytes())
        for name in DISTRIBUTIONS
    }
    assert {name: digest.hexdigest()[:16] for name, digest in digests.items()} == GOLDEN


# --- on what they do not depend -----------------------------------------------------------------


@every_distribution
@pytest.mark.parametrize("num_workers", [2, 7])
def test_workers_draw_what_one_would(distribution: str, num_workers: int) -> None:
    sampler = build(distribution, 50, 6)
    exclude = Jagged.from_lengths(torch.arange(3).repeat(20), torch.full((20,), 3))
    whole = sampler.sample(20, step=4, exclude=exclude)
    for rank in range(num_workers):
        mine = torch.arange(rank, 20, num_workers)
        part = build(distribution, 50, 6).sample(mine, step=4, exclude=exclude.select(mine))
        assert torch.equal(part.ids, whole.ids[mine])
        assert torch.equal(part.log_q, whole.log_q[mine])


@every_distribution
def test_more_draws_begin_with_the_same(distribution: str) -> None:
    few, many = (build(distribution, 1000, num).sample(3, step=1).ids for num in (5, 300))
    assert torch.equal(few, many[:, :5])


@every_distribution
@pytest.mark.cpu_only
def test_threads_do_not_matter(distribution: str) -> None:
    sampler = build(distribution, 1000, 64)
    before = torch.get_num_threads()
    runs = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        runs.append(sampler.sample(300, step=0))
    torch.set_num_threads(before)
    assert all(torch.equal(run.ids, runs[0].ids) for run in runs)
    assert all(torch.equal(run.log_q, runs[0].log_q) for run in runs)


@every_distribution
def test_seeds_steps_and_rows_give_other_ids(distribution: str) -> None:
    sampler = build(distribution, 1000, 16)
    base = sampler.sample(2, step=0).ids
    others = [sampler.sample(2, step=1).ids, build(distribution, 1000, 16, 1).sample(2, step=0).ids]
    assert not any(torch.equal(other, base) for other in others)
    assert not torch.equal(base[0], base[1])


def test_rows_of_any_stride_and_none_at_all() -> None:
    sampler = build("unigram", 100, 5)
    rows = torch.arange(20)
    assert torch.equal(sampler.sample(rows[::2], step=0).ids, sampler.sample(20, step=0).ids[::2])
    assert sampler.sample(0, step=0).ids.shape == (0, 5)
    assert build("unigram", 100, 0).sample(3, step=0).ids.shape == (3, 0)
    assert build("uniform", 100, 0).sample(3, step=0).log_q.shape == (3, 0)


# --- exclusions ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_an_excluded_item_never_comes_out(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(2, 40))
    some_items = st.sets(st.integers(0, num_items - 1), max_size=num_items - 1)
    rows = data.draw(st.lists(some_items, min_size=1, max_size=4))
    sampler = build(data.draw(st.sampled_from(DISTRIBUTIONS)), num_items, 30)
    ids, log_q = sampler.sample(
        len(rows), step=data.draw(st.integers(0, 99)), exclude=exclude_rows(*map(sorted, rows))
    )
    for row, excluded in enumerate(rows):
        assert not excluded & set(ids[row].tolist())
    assert ids.min() >= 0
    assert ids.max() < num_items
    assert log_q.isfinite().all()


def test_an_item_without_counts_never_comes_out() -> None:
    counts = torch.tensor([0, 5, 0, 1, 0, 0])
    sampler = NegativeSampler(6, 200, distribution="unigram", counts=counts)
    exclude = exclude_rows([], [1], [3], [0, 2])
    ids, _ = sampler.sample(4, step=0, exclude=exclude)
    assert [row.unique().tolist() for row in ids] == [[1, 3], [3], [1], [1, 3]]
    assert sampler.log_q(torch.tensor([0]))[0] == -torch.inf


# --- log_q --------------------------------------------------------------------------------------


def probabilities(distribution: str, num_items: int) -> Tensor:
    weights = weights_of(distribution, num_items)
    weights = torch.ones(num_items) if weights is None else weights
    return weights.double() / weights.double().sum()


@every_distribution
@pytest.mark.parametrize("num_items", [1, 10, 3000])
def test_log_q_is_the_log_of_the_expected_count(distribution: str, num_items: int) -> None:
    sampler = build(distribution, num_items, 20)
    ids, log_q = sampler.sample(3, step=0)
    expected = (20 * probabilities(distribution, num_items)).log().float()
    torch.testing.assert_close(log_q, expected[ids], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sampler.log_q(torch.arange(num_items)), expected)


@every_distribution
def test_log_q_is_of_the_items_that_are_not_excluded(distribution: str) -> None:
    share = probabilities(distribution, 30)
    exclude = exclude_rows([], [0, 1, 2, 10, 29], [5])
    ids, log_q = build(distribution, 30, 20).sample(3, step=0, exclude=exclude)
    for row in range(3):
        left = share.clone()
        left[exclude.values[exclude.offsets[row] : exclude.offsets[row + 1]]] = 0
        expected = (20 * left / left.sum()).log().float()
        torch.testing.assert_close(log_q[row], expected[ids[row]])


# --- shared -------------------------------------------------------------------------------------


@every_distribution
def test_shared_negatives_are_those_of_row_zero(distribution: str) -> None:
    sampler = build(distribution, 100, 20)
    shared, row = sampler.sample_shared(step=5), sampler.sample(1, step=5)
    assert torch.equal(shared.ids, row.ids[0])
    assert torch.equal(shared.log_q, row.log_q[0])
    excluding = sampler.sample_shared(step=5, exclude=torch.tensor([0, 2]))
    assert not {0, 2} & set(excluding.ids.tolist())


def first_distinct(ids: list[int], num: int) -> tuple[list[int], int]:
    """The first `num` distinct ids, and how many had to be looked at."""
    seen: dict[int, None] = {}
    for place, item in enumerate(ids):
        seen.setdefault(item)
        if len(seen) == num:
            return list(seen), place + 1
    raise AssertionError("too few")


@every_distribution
@pytest.mark.parametrize("excluded", [[], [0, 1, 7]])
def test_unique_negatives_are_the_first_distinct_draws(
    distribution: str, excluded: list[int]
) -> None:
    exclude = torch.tensor(excluded, dtype=torch.int64)
    drawn = build(distribution, 40, 20).sample_shared(step=5, exclude=exclude, unique=True)
    draws = build(distribution, 40, 2000).sample_shared(step=5, exclude=exclude).ids.tolist()
    ids, num_tries = first_distinct(draws, 20)
    assert drawn.ids.tolist() == ids
    left = probabilities(distribution, 40)
    left[exclude] = 0
    left /= left.sum()
    expected = (1 - (1 - left[ids]) ** num_tries).log().float()
    torch.testing.assert_close(drawn.log_q, expected, rtol=1e-5, atol=1e-6)


def test_unique_negatives_may_be_all_items() -> None:
    drawn = build("log_uniform", 50, 50).sample_shared(step=0, unique=True)
    assert sorted(drawn.ids.tolist()) == list(range(50))
    assert drawn.log_q.tolist() == [0] * 50
    one = NegativeSampler(9, 1, distribution="unigram", counts=torch.eye(9)[4])
    drawn = one.sample_shared(step=0, unique=True)
    assert (drawn.ids.tolist(), drawn.log_q.tolist()) == ([4], [0])
    assert build("uniform", 9, 0).sample_shared(step=0, unique=True).ids.shape == (0,)


def test_unique_negatives_that_hardly_ever_come_up_fill_up_in_order() -> None:
    counts = torch.tensor([10.0, 1e-12, 10.0, 0, 1e-12, 1e-12])
    sampler = NegativeSampler(6, 3, distribution="unigram", counts=counts, alpha=1)
    drawn = sampler.sample_shared(step=0, unique=True, exclude=torch.tensor([1]))
    assert sorted(drawn.ids[:2].tolist()) == [0, 2]
    assert drawn.ids[2] == 4
    assert drawn.log_q.tolist() == [0, 0, 0]  # 4096 tries, and what fills up is certain


@pytest.mark.parametrize("exclude", [None, torch.tensor([0, 3])])
def test_too_few_items_for_unique_negatives(exclude: Tensor | None) -> None:
    counts = torch.tensor([1, 1, 1, 0, 0])
    num = 4 if exclude is None else 3
    sampler = NegativeSampler(5, num, distribution="unigram", counts=counts)
    with pytest.raises(ValueError, match=f"{num} unique negatives are asked of the {num - 1} item"):
        sampler.sample_shared(step=0, unique=True, exclude=exclude)


# --- the alias table ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.one_of(st.just(0.0), st.floats(1e-30, 1e30), st.integers(1, 5).map(float)),
        min_size=1,
        max_size=60,
    ).filter(any)
)
def test_the_alias_table_holds_the_probabilities_exactly(weights: list[float]) -> None:
    columns, mass = OPS.alias_table(torch.tensor(weights, dtype=torch.float64))
    coins = [0] * len(weights)
    for column, (own, alias, *_) in enumerate(columns.tolist()):
        coins[column] += own & WORD
        coins[alias] += COINS - (own & WORD)
    assert coins == mass.tolist()
    total = len(weights) * COINS
    assert sum(coins) == total
    # A coin of rounding each, and one for each item that was given its only coin.
    slack = 1 + len(weights) + total * 1e-13
    for weight, mine in zip(weights, coins, strict=True):
        assert (mine > 0) == (weight > 0)
        assert abs(mine - weight / sum(weights) * total) <= slack


def test_log_q_stands_beside_the_items_in_the_alias_table() -> None:
    columns, mass = OPS.alias_table(torch.tensor([1.0, 5.0, 0.0, 2.0, 1.0], dtype=torch.float64))
    log_q = (mass.double() / mass.sum()).log().float()
    own, alias = columns.view(torch.float32)[:, 2:].T
    assert torch.equal(own, log_q)
    assert torch.equal(alias, log_q[columns[:, 1].long()])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_items": 0}, r"num_items must be in \[1, 2\^31\), got 0"),
        ({"num_items": 2**31}, "num_items must be in"),
        ({"num_negatives": -1}, "num_negatives must be 0 or more, got -1"),
        ({"distribution": "zipf"}, 'distribution must be "uniform", .* got "zipf"'),
        ({"distribution": "unigram"}, 'counts and distribution "unigram" go together'),
        ({"counts": torch.ones(5)}, 'counts and distribution "unigram" go together'),
        ({"seed": -1}, r"seed must be in \[0, 2\^32\), got -1"),
        ({"seed": 2**32}, "seed must be in"),
        (
            {"distribution": "unigram", "counts": torch.ones(4)},
            r"counts must have shape \(5,\), got \(4,\)",
        ),
        (
            {"distribution": "unigram", "counts": torch.tensor([1, 1, -1, 1, 1])},
            "counts must be finite and 0 or more, got -1 for item 2",
        ),
        ({"distribution": "unigram", "counts": torch.zeros(5)}, "some weight must be positive"),
        (
            {"distribution": "unigram", "counts": torch.ones(5), "alpha": float("nan")},
            "alpha must be finite and 0 or more",
        ),
    ],
)
def test_refuses_a_sampler(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NegativeSampler(**({"num_items": 5, "num_negatives": 3} | arguments))  # type: ignore[arg-type]


def sample_with(exclude: Jagged | None = None, rows: int | Tensor = 2, step: int = 0) -> object:
    return build("unigram", 5, 3).sample(rows, step=step, exclude=exclude)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: sample_with(step=-1), r"step must be in \[0, 2\^32\), got -1"),
        (lambda: sample_with(rows=torch.zeros(2)), "rows must be Long of shape"),
        (lambda: sample_with(rows=torch.zeros(2, 2).long()), r"rows must be \(R,\), got \[2, 2\]"),
        (lambda: sample_with(exclude_rows([1])), r"exclude_offsets must be Long of shape \[3\]"),
    ],
)
def test_refuses_arguments(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: sample_with(rows=torch.tensor([2**32])), r"rows must be in \[0, 2\^32\)"),
        (lambda: sample_with(rows=torch.tensor([-1])), "rows must be in"),
        (
            lambda: sample_with(exclude_rows([], [2, 1])),
            "row 1 excludes must ascend, got 1 after 2",
        ),
        (lambda: sample_with(exclude_rows([], [2, 2])), "row 1 excludes must ascend"),
        (lambda: sample_with(exclude_rows([5], [])), "row 0 excludes item 5, but items are 0 to 4"),
        (lambda: sample_with(exclude_rows([-1], [])), "row 0 excludes item -1"),
        (lambda: sample_with(exclude_rows([], list(range(5)))), "row 1 excludes all 5 items"),
        (
            lambda: sample_with(Jagged(torch.tensor([1, 2]), torch.tensor([0, 2, 3]))),
            "offsets must ascend from 0 to 2, got 2 and 3 for row 1",
        ),
    ],
)
@pytest.mark.cpu_only
def test_refuses_what_stands_in_rows_and_exclusions(
    draw: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


# --- torch --------------------------------------------------------------------------------------


@pytest.mark.cpu_only  # opcheck wants the operators that torch itself compiles against
@every_distribution
def test_operators_pass_opcheck(distribution: str) -> None:
    tables = build(distribution, 20, 3)._tables_on(torch.device("cpu"))
    exclude = exclude_rows([1, 2], [])
    drawn_from = (20, 0, 0, tables.columns, tables.mass, exclude.values, exclude.offsets)
    torch.library.opcheck(OPS.sample_negatives.default, (torch.arange(2), 3, *drawn_from))
    torch.library.opcheck(OPS.philox.default, (torch.ones(2, 4).long(), torch.ones(2).long()))
    torch.library.opcheck(OPS.alias_table.default, (torch.ones(3).double(),))


@pytest.mark.cpu_only
def test_another_step_compiles_nothing_anew() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def draw(rows: Tensor, step: int) -> Tensor:
        args = (rows, 3, 100, 0, step, None, None, None, None)
        return OPS.sample_negatives(*args)[0] + 1

    rows = torch.arange(4)
    drawn = [draw(rows, step) - 1 for step in range(8)]
    assert counter.frame_count <= 2  # for the first step, and for any
    sampler = build("uniform", 100, 3)
    assert all(torch.equal(d, sampler.sample(4, step=s).ids) for s, d in enumerate(drawn))
