// What the CPU kernels of infonce read, in the dtype of the computation, and the visits to its
// rows.

#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "infonce/infonce.h"
#include "infonce/infonce_rows.h"

namespace torchrec_pt {

constexpr int64_t kLogitsPerThread = 16384;  // fewer are not worth waking a thread for

// Logits are visited in tiles of kTileRows x kTileKeys (512 KiB of float32) that stay in the L2
// cache, or in blocks of rows against all keys.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileKeys = 512;

// Between the rows of a tile: a power of two from row to row would put a column in one cache set.
constexpr int64_t kRowPadding = 32;

// Rows of a matrix in the dtype of the computation; no copy where they already are that.
inline at::Tensor rows_of(const at::Tensor& matrix, int64_t first, int64_t count,
                          at::ScalarType dtype) {
  return matrix.narrow(0, first, count).to(dtype).contiguous();
}

// What the loops read besides the products.
template <typename T>
class Logits {
 public:
  // The products of a tile of up to tile_rows x tile_keys are written to one buffer.
  Logits(const InfonceProblem& problem, int64_t tile_rows, int64_t tile_keys)
      : num_rows(problem.query.size(0)),
        num_keys(problem.keys.size(0)),
        inverse_tau(static_cast<T>(1 / problem.temperature.item<double>())),
        query_(problem.query),
        keys_(problem.keys),
        shift_(at::zeros({num_keys}, dtype())),
        target_(contiguous(problem.target)),
        key_ids_(contiguous(problem.key_ids)),
        query_ids_(contiguous(problem.query_ids)),
        key_query_ids_(contiguous(problem.key_query_ids)),
        self_index_(contiguous(problem.self_index)),
        key_bias_(at::zeros({num_keys}, dtype())),
        log_q_positive_(at::zeros({num_rows}, dtype())),
        products_(
            at::empty({std::min(tile_rows, num_rows), std::min(tile_keys, num_keys) + kRowPadding},
                      dtype())) {
    TORCH_CHECK_VALUE(problem.temperature.item<double>() > 0,
                      "infonce: temperature must be positive, got ",
                      problem.temperature.item<double>());
    if (problem.key_bias) key_bias_.copy_(*problem.key_bias);
    if (problem.log_q_positive) log_q_positive_.copy_(*problem.log_q_positive);
    shift_.copy_(key_bias_);
    if (problem.log_q) shift_.sub_(problem.log_q->to(dtype()));
    if (target_) check_target();
  }

  static at::ScalarType dtype() { return c10::CppTypeToScalarType<T>::value; }

  bool has_target() const { return target_.has_value(); }
  int64_t target(int64_t row) const { return target_->const_data_ptr<int64_t>()[row]; }
  const T* shift(int64_t key) const { return shift_.template const_data_ptr<T>() + key; }

  at::Tensor queries(int64_t first, int64_t count) const {
    return rows_of(query_, first, count, dtype());
  }
  at::Tensor keys(int64_t first, int64_t count) const {
    return rows_of(keys_, first, count, dtype());
  }

  // z = Q Kᵀ of one tile, in the buffer that all tiles share.
  at::Tensor products(const at::Tensor& queries, const at::Tensor& keys) const {
    auto z = products_.narrow(0, 0, queries.size(0)).narrow(1, 0, keys.size(0));
    at::mm_out(z, queries, keys.t());
    return z;
  }

  T positive_logit(int64_t row, T positive_dot) const {
    return positive_dot * inverse_tau + key_bias_.template const_data_ptr<T>()[target(row)] -
           log_q_positive_.template const_data_ptr<T>()[row];
  }

  // Sets -inf where a key of the tile is not allowed, and at the target.
  void mask(T* z, int64_t row, int64_t first_key, int64_t count) const {
    constexpr T kMasked = -std::numeric_limits<T>::infinity();
    const auto* key_ids = data_or_null<int64_t>(key_ids_);
    const auto* query_ids = data_or_null<int64_t>(query_ids_);
    const auto* key_query_ids = data_or_null<int64_t>(key_query_ids_);
    const auto* self_index = data_or_null<int64_t>(self_index_);
    if (key_ids) mask_equal(z, key_ids + first_key, count, key_ids[target(row)]);
    if (query_ids) mask_equal(z, key_query_ids + first_key, count, query_ids[row]);
    if (self_index && in_tile(self_index[row], first_key, count)) {
      z[self_index[row] - first_key] = kMasked;
    }
    if (has_target() && in_tile(target(row), first_key, count)) {
      z[target(row) - first_key] = kMasked;
    }
  }

  static bool in_tile(int64_t key, int64_t first_key, int64_t count) {
    return key >= first_key && key < first_key + count;
  }

  const int64_t num_rows;
  const int64_t num_keys;
  const T inverse_tau;

 private:
  void check_target() const {
    for (int64_t row = 0; row < num_rows; ++row) {
      TORCH_CHECK_VALUE(target(row) >= 0 && target(row) < num_keys,
                        "infonce: target must be in [0, N) with N = ", num_keys, ", got ",
                        target(row), " in row ", row);
    }
  }

  at::Tensor query_;
  at::Tensor keys_;
  at::Tensor shift_;  // key_bias - log_q
  OptionalTensor target_;
  OptionalTensor key_ids_;
  OptionalTensor query_ids_;
  OptionalTensor key_query_ids_;
  OptionalTensor self_index_;
  at::Tensor key_bias_;
  at::Tensor log_q_positive_;
  at::Tensor products_;
};

// The online logsumexp of a row, or of a column.
template <typename T>
struct LogSumExp {
  T highest = -std::numeric_limits<T>::infinity();
  T sum = 0;  // sum_j exp(s_j - highest)
  T dot = 0;  // sum_j exp(s_j - highest) z_j

  void merge(T other_highest, T other_sum, T other_dot) {
    if (other_sum == 0) return;  // every key was masked
    const T merged = std::max(highest, other_highest);
    const T scale = std::exp(highest - merged);
    const T other_scale = std::exp(other_highest - merged);
    sum = sum * scale + other_sum * other_scale;
    dot = dot * scale + other_dot * other_scale;
    highest = merged;
  }

  T value() const { return highest + std::log(sum); }
  T expected_dot() const { return sum == 0 ? 0 : dot / sum; }
};

template <typename T>
struct RowState {
  LogSumExp<T> negatives;
  T positive_dot = 0;
};

// Masks a row of a tile, with its target, and merges the rest of it into the row's state.
template <typename T>
void visit_row(const Logits<T>& logits, T* z, int64_t row, int64_t first_key, int64_t num_keys,
               RowState<T>& state) {
  if (logits.has_target() && logits.in_tile(logits.target(row), first_key, num_keys)) {
    state.positive_dot = z[logits.target(row) - first_key];
  }
  logits.mask(z, row, first_key, num_keys);
  const T* shift = logits.shift(first_key);
  const T highest = max_logit(z, shift, num_keys, logits.inverse_tau);
  // Where every key of the tile is masked there is no maximum to subtract.
  const T subtracted = highest == -std::numeric_limits<T>::infinity() ? 0 : highest;
  const auto [sum, dot] = exp_sums(z, shift, num_keys, logits.inverse_tau, subtracted);
  state.negatives.merge(subtracted, sum, dot);
}

// The queries of a block with zeros in the dead rows: 0 * inf would reach dk as NaN.
template <typename IsDead>
at::Tensor without_dead_rows(at::Tensor queries, const IsDead& is_dead) {
  bool is_copy = false;
  for (int64_t r = 0; r < queries.size(0); ++r) {
    if (!is_dead(r)) continue;
    if (!is_copy) queries = queries.clone();
    is_copy = true;
    queries.select(0, r).zero_();
  }
  return queries;
}

// Ranges of rows or columns of a tile, each `size` logits long.
template <typename Visit>
void for_each_range(int64_t count, int64_t size, const Visit& visit) {
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(1, size));
  at::parallel_for(0, count, grain, visit);
}

template <typename Visit>
void for_each_row(int64_t num_rows, int64_t num_keys, const Visit& visit) {
  for_each_range(num_rows, num_keys, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) visit(row);
  });
}

}  // namespace torchrec_pt
