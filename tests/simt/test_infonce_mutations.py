"""Faults planted in the CUDA sources of infonce, compiled for D <= 64 alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simt.build import COMPILER
from tests.simt.mutations import Edit, assert_noticed, assert_pass, run_tests

pytestmark = [pytest.mark.soak, pytest.mark.skipif(COMPILER is None, reason="no g++")]

TILE = "infonce_tile.cuh"
FORWARD, BACKWARD = "infonce_forward.cu", "infonce_backward.cu"


# One kDim, and no kind of numbers twice.
RESTRICTIONS = (
    Edit(TILE, "  if (dim <= 32) return launcher.template operator()<Number, 32>();\n", ""),
    Edit(TILE, "  if (dim <= 128) return launcher.template operator()<Number, 128>();\n", ""),
    Edit(TILE, "launcher.template operator()<Number, kMostDims>()", "1"),
    Edit(TILE, "dispatch_dim<Tf32>", "dispatch_dim<Tf32x3>"),
)
# Of the tests of the operator those that take no larger D and have no long runs.
TESTS = (
    "(reference or decides or masked or nothing or no_correction or weight or 16_bit or pytorch) "
    "and not (100 or 128 or 256 or shape5 or shape7 or shape8)"
)

MUTATIONS = {
    # The online softmax.
    "no_rescale_of_the_running_sums": Edit(
        FORWARD,
        "{highest[m][h], rows[m][h].sum * factor, rows[m][h].dot * factor}",
        "{highest[m][h], rows[m][h].sum, rows[m][h].dot}",
    ),
    "no_running_maximum": Edit(
        FORWARD, "fmaxf(highest[m][i / 2], row_logit(m, n, i, row, column))", "0.0f"
    ),
    "half_of_the_lanes_of_a_row_merged": Edit(
        FORWARD,
        "merged_with_lane(merged_with_lane(rows[m][h], 1), 2)",
        "merged_with_lane(rows[m][h], 1)",
    ),
    "dot_of_an_absent_key_counted": Edit(FORWARD, "if (e != 0) rows", "rows"),
    "splits_of_forward_not_merged": Edit(
        FORWARD, "part < num_parts; ++part) {\n    total", "part < 1; ++part) {\n    total"
    ),
    "splits_of_backward_not_merged": Edit(
        BACKWARD, "part < num_parts; ++part) sum", "part < 1; ++part) sum"
    ),
    "columns_of_earlier_tiles_forgotten": Edit(
        FORWARD, "is_first ? no_sums() : totals[i]", "no_sums()"
    ),
    # Order of execution.
    "no_barrier_before_the_products": Edit(
        FORWARD, "copy_async_wait<1>();\n    __syncthreads();", "copy_async_wait<1>();"
    ),
    "no_barrier_after_the_products": Edit(
        FORWARD, "put(thread, next);\n    __syncthreads();", "put(thread, next);"
    ),
    "no_barrier_after_the_products_of_backward": Edit(
        BACKWARD, "put(thread, next);\n    __syncthreads();", "put(thread, next);"
    ),
    "no_wait_for_the_copies": Edit(FORWARD, "    copy_async_wait<1>();\n", ""),
    "too_short_a_wait_for_the_copies": Edit(BACKWARD, "copy_async_wait<1>", "copy_async_wait<2>"),
    "next_tile_copied_over_this_one": Edit(
        FORWARD, "load_keys(next_key, buffer ^ 1)", "load_keys(next_key, buffer)"
    ),
    # Fragments.
    "swapped_registers_of_b": Edit(
        TILE, "{raw[2 * half], raw[2 * half + 1]};", "{raw[2 * half + 1], raw[2 * half]};"
    ),
    "offsets_of_rows_where_columns_are_transposed": Edit(
        BACKWARD,
        "y += lane % 16 * Tile::kRowBytes + lane / 16 * 16;",
        "y += (lane % 8 + lane / 16 * 8) * Tile::kRowBytes + lane / 8 % 2 * 16;",
    ),
    "contraction_not_renamed_for_tf32": Edit(
        BACKWARD,
        "__float_as_uint(d[2]),\n                                      __float_as_uint(d[1])",
        "__float_as_uint(d[1]),\n                                      __float_as_uint(d[2])",
    ),
    "one_of_three_tf32_products_left_out": Edit(
        TILE, "    multiply_add_tf32(d, a.low, b.high[0], b.high[1]);\n", ""
    ),
    # What takes part.
    "target_allowed_to_be_masked": Edit(TILE, " && !is_target) z", ") z"),
    "key_ids_compared_as_int32": Edit(
        TILE,
        "keys.key_id[j] == queries.target_id[i]",
        "int(keys.key_id[j]) == int(queries.target_id[i])",
    ),
    "query_ids_compared_as_int32": Edit(
        TILE,
        "keys.key_query_id[j] == queries.query_id[i]",
        "int(keys.key_query_id[j]) == int(queries.query_id[i])",
    ),
    "self_index_off_by_one": Edit(
        TILE, "queries.self_index[i] == first_key + j", "queries.self_index[i] == first_key + j + 1"
    ),
    "self_index_cut_to_int32": Edit(
        TILE, "index < 0 || index > INT32_MAX ? -1 : static_cast<int>(index)", "int(index)"
    ),
    "keys_past_the_last_kept": Edit(
        TILE, "{0, 0, -INFINITY, INFINITY, 0}", "{0, 0, 0, INFINITY, 0}"
    ),
    "columns_past_the_dim_kept": Edit(
        TILE, "exists ? min(kChunk, dim - column) : 0", "exists ? kChunk : 0"
    ),
    "absent_queries_in_the_columns": Edit(
        FORWARD, "queries.lse[first_row + 16 * m + 8 * h] != INFINITY", "true"
    ),
    "absent_queries_in_the_gradient_of_columns": Edit(
        BACKWARD, "is_live ? keys.column_grad[j] * column : 0", "keys.column_grad[j] * column"
    ),
    "vectors_of_absent_queries_loaded": Edit(TILE, " && (!is_live || is_live[first + row]);", ";"),
    "keys_past_the_pairs_in_the_columns": Edit(
        TILE, "from.column_lse && j < from.num_columns", "from.column_lse"
    ),
    # What is added and written.
    "positive_without_its_own_shift": Edit(
        FORWARD,
        "is_target ? queries.positive_shift[row] : keys.shift[column]",
        "keys.shift[column]",
    ),
    "positive_without_its_own_shift_in_backward": Edit(
        BACKWARD, "is_target ? queries.positive_shift[i] : keys.shift[j]", "keys.shift[j]"
    ),
    "own_rows_past_the_last_written": Edit(BACKWARD, "if (row >= num) continue;", ""),
    "bias_of_rows_past_the_last_written": Edit(
        BACKWARD, "if (thread % 4 == 0 && row < own.num)", "if (thread % 4 == 0)"
    ),
    "sums_of_rows_past_the_last_written": Edit(
        FORWARD, "if (lane % 4 == 0 && row < queries.num)", "if (lane % 4 == 0)"
    ),
    "bias_with_what_comes_from_the_columns": Edit(
        BACKWARD,
        "(is_live ? keys.column_grad[j] * column : 0);",
        "(is_live ? keys.column_grad[j] * column : 0);\n      sum += dot - row - at_target;",
    ),
    "whole_target_in_the_bias": Edit(BACKWARD, "at_target / 2", "at_target"),
    # Units.
    "float16_ds_without_scaling": Edit(BACKWARD, "Float16> ? 4096.f : 1.f", "Float16> ? 1.f : 1.f"),
    "grad_scale_left_out": Edit(
        BACKWARD, "from_scaled = grad_scale / kLargestDs", "from_scaled = 1 / kLargestDs"
    ),
    "lse_not_in_log2_units": Edit(TILE, "from.lse[i] * kLog2E", "from.lse[i]"),
    "column_lse_not_in_log2_units": Edit(TILE, "from.column_lse[j] * kLog2E", "from.column_lse[j]"),
    "shift_not_in_log2_units": Edit(TILE, "from.shift[j] * kLog2E", "from.shift[j]"),
}


def test_the_sources_without_a_fault_pass(tmp_path: Path) -> None:
    assert_pass(run_tests("infonce", RESTRICTIONS, tmp_path, chosen=TESTS))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_fault_is_noticed(mutation: str, tmp_path: Path) -> None:
    edits = (*RESTRICTIONS, MUTATIONS[mutation])
    assert_noticed(run_tests("infonce", edits, tmp_path, chosen=TESTS))
