"""Faults planted in the CUDA sources of negatives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simt.build import COMPILER
from tests.simt.mutations import Edit, assert_noticed, assert_pass, run_tests

pytestmark = [pytest.mark.soak, pytest.mark.skipif(COMPILER is None, reason="no g++")]

PHILOX, DRAW, KERNELS = "philox.h", "draw.h", "negatives.cu"
MUTATIONS = {
    "nine_rounds": Edit(PHILOX, "round < 10", "round < 9"),
    "key_not_raised": Edit(PHILOX, "key.high += 0xBB67AE85", "key.high += 0"),
    "words_out_of_order": Edit(PHILOX, "i & 2 ? z : x", "i & 2 ? x : z"),
    "columns_never_refused": Edit(DRAW, "product) < remainder", "product) < 0"),
    "coin_of_another_column": Edit(DRAW, "coin >= at.coins_of_own", "coin > at.coins_of_own"),
    "log_q_of_the_other_item": Edit(DRAW, "at.log_q[is_alias]", "at.log_q[1 - is_alias]"),
    "first_retry_left_out": Edit(DRAW, "std::uint32_t retry = 1;", "std::uint32_t retry = 2;"),
    "one_try_too_few": Edit(DRAW, "retry < kTries", "retry < kTries - 1"),
    "coin_not_drawn_again": Edit(DRAW, "place.word(retry, kCoin)", "place.word(0, kCoin)"),
    "redrawn_item_not_compared": Edit(DRAW, "if (!excluded.contains(drawn.item)) return", "return"),
    "excluded_mass_counted_up": Edit(
        DRAW, "      ++next_excluded;\n      continue;", "++next_excluded;"
    ),
    "mass_up_to_the_item_itself": Edit(DRAW, "if (left < mass)", "if (left <= mass)"),
    "upper_half_of_the_mass_left_out": Edit(DRAW, "(excluded.mass_left >> 32) * word +", ""),
    "lower_half_of_the_mass_left_out": Edit(DRAW, " + (low * word >> 32)", ""),
    "other_items_off_by_one": Edit(DRAW, "items[i] - i > k", "items[i] - i >= k"),
    "last_excluded_item_overlooked": Edit(DRAW, "return i < size &&", "return i + 1 < size &&"),
    "search_goes_astray": Edit(DRAW, "items[i] >= item", "items[i] > item"),
    "refused_column_kept": Edit(KERNELS, "distribution.refuses(product) || ", ""),
    "excluded_item_kept": Edit(KERNELS, " || excluded.contains(drawn.item)", ""),
    "exclusions_of_the_row_before": Edit(
        KERNELS, "items += problem.exclude_offsets[r];", "items += problem.exclude_offsets[0];"
    ),
    "draws_past_the_last_written": Edit(KERNELS, " && first + i < problem.num_draws", ""),
    "rows_numbered_from_zero": Edit(
        KERNELS, "static_cast<std::uint32_t>(problem.rows[r])", "static_cast<std::uint32_t>(r)"
    ),
    "log_q_without_the_exclusions": Edit(
        KERNELS, "last = item;", "last = item, mass = problem.total_mass;"
    ),
    "log_q_of_one_draw": Edit(KERNELS, "log(draws * total", "log(total"),
    "one_coin_for_all": Edit(KERNELS, "coins.at(i)", "coins.at(0)"),
}


def test_the_sources_without_a_fault_pass(tmp_path: Path) -> None:
    assert_pass(run_tests("negatives", (), tmp_path))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_fault_is_noticed(mutation: str, tmp_path: Path) -> None:
    assert_noticed(run_tests("negatives", (MUTATIONS[mutation],), tmp_path))
