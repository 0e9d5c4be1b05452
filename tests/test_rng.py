"""Randomness by counter: uniform, unrelated where it should be, the same wherever a row lives.

Every bound is about five standard deviations of a sound generator; the draws are fixed by
their keys, so a test that passes once passes always.
"""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch import Tensor

from torchrec_pt import rng
from torchrec_pt.rng import RowNoise

NUM = 20_000


def _noise(seed: int = 0, step: int = 0, num_rows: int = NUM) -> RowNoise:
    return RowNoise(seed, step, torch.arange(num_rows))


def _lots(noise: RowNoise, site: str = "site") -> Tensor:
    return noise.per_row(site, 1).squeeze(1)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def test_mix_is_splitmix64() -> None:
    # The published sequence of seed 1234567; the state goes up by the golden ratio.
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + i * golden) % 2**64 for i in range(3)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    out = [value % 2**64 for value in rng.mix(signed).tolist()]
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("kind", ["rows", "columns", "tokens", "steps"])
def test_lots_are_uniform(kind: str) -> None:
    noise = _noise()
    lots = {
        "rows": lambda: _lots(noise),
        "columns": lambda: _noise(num_rows=4).per_row("site", NUM // 4),
        "tokens": lambda: noise.per_token("site", torch.arange(NUM) // 10, torch.arange(NUM) % 10),
        "steps": lambda: torch.cat([_lots(_noise(step=s, num_rows=20)) for s in range(NUM // 20)]),
    }[kind]().flatten()
    assert len(lots) == NUM
    assert lots.min() >= 0
    assert lots.max() < 1
    counts = torch.histc(lots, 64, 0, 1)
    chi_square = float(((counts - NUM / 64) ** 2 / (NUM / 64)).sum())
    # 63 degrees of freedom: mean 63, deviation sqrt(2 · 63) = 11.2. Too even is as wrong.
    assert 20 < chi_square < 119


def test_rows_steps_seeds_sites_and_columns_are_unrelated() -> None:
    base = _lots(_noise())
    others = {
        "next row": base.roll(1),
        "next step": _lots(_noise(step=1)),
        "next seed": _lots(_noise(seed=1)),
        "other site": _lots(_noise(), "sitf"),
        "next column": _noise().per_row("site", 2)[:, 1],
        "token": _noise().per_token("site", torch.arange(NUM), torch.ones(NUM, dtype=torch.int64)),
    }
    for name, other in others.items():
        assert not torch.equal(base, other), name
        # The correlation of independent samples has deviation 1 / sqrt(NUM).
        assert abs(_correlation(base, other)) < 5 / NUM**0.5, name


def test_seed_and_step_are_not_added_up() -> None:
    assert not torch.equal(_lots(_noise(seed=1, step=2)), _lots(_noise(seed=2, step=1)))
    assert not torch.equal(_lots(_noise(seed=1, step=11)), _lots(_noise(seed=11, step=1)))


def test_a_row_draws_the_same_wherever_it_stands() -> None:
    rows = torch.tensor([7, 2, 9, 4])
    whole, some = _noise(num_rows=10), RowNoise(0, 0, rows)
    assert torch.equal(some.per_row("s", 3), whole.per_row("s", 3)[rows])
    row, position = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 5, 5, 2])
    assert torch.equal(
        some.per_token("s", row, position), whole.per_token("s", rows[row], position)
    )
    assert torch.equal(
        some.token_bits("s", row, position), whole.token_bits("s", rows[row], position)
    )


def test_copies_are_all_rows_then_all_again_and_draw_apart() -> None:
    rows = torch.tensor([5, 4])  # neighbours, whose copies must not meet
    copies = RowNoise(3, 4, rows).copies(3)
    lots = _lots(copies)
    assert len(lots.unique()) == 6
    # Row 5 alone draws for its copies what it draws in company.
    alone = _lots(RowNoise(3, 4, rows[:1]).copies(3))
    assert torch.equal(alone, lots[[0, 2, 4]])


@pytest.mark.parametrize("num", [0, 1, 2, 1000])
def test_a_permutation_holds_every_number_once(num: int) -> None:
    assert torch.equal(rng.permutation(num, 3, "epoch", 0).sort().values, torch.arange(num))


def test_permutations_of_two_keys_differ_and_favour_no_place() -> None:
    first = rng.permutation(1000, 0, "epoch", 0)
    assert torch.equal(first, rng.permutation(1000, 0, "epoch", 0))
    assert not torch.equal(first, rng.permutation(1000, 0, "epoch", 1))
    assert abs(_correlation(first, torch.arange(1000))) < 5 / 1000**0.5
    # Where 0 goes among 5, over 2000 keys: 4 degrees of freedom, so 30 is beyond one in 10^5.
    places = torch.tensor([rng.permutation(5, key).argmin() for key in range(2000)])
    counts = torch.bincount(places, minlength=5)
    assert float(((counts - 400) ** 2 / 400).sum()) < 30


def test_normal_rows_are_standard_normal_and_unrelated() -> None:
    values = rng.normal_rows(torch.arange(5000), 8, 0, "table")
    flat = values.flatten().double()
    num = len(flat)
    assert abs(flat.mean()) < 5 / num**0.5
    assert abs(flat.var() - 1) < 5 * (2 / num) ** 0.5
    assert abs((flat**4).mean() - 3) < 5 * (96 / num) ** 0.5  # Var(z^4) = 105 − 9
    assert scipy.stats.kstest(flat.numpy(), "norm").pvalue > 1e-6
    assert torch.isfinite(values).all()
    off_diagonal = torch.corrcoef(values.T.double()) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / 5000**0.5
    assert abs(_correlation(values[:-1, 0], values[1:, 0])) < 5 / 5000**0.5


def test_a_normal_row_is_the_same_whoever_asks_for_it() -> None:
    whole = rng.normal_rows(torch.arange(100), 16, 7, "table")
    rows = torch.tensor([99, 0, 41])
    assert torch.equal(rng.normal_rows(rows, 16, 7, "table"), whole[rows])
    assert not torch.equal(rng.normal_rows(rows, 16, 8, "table"), whole[rows])
