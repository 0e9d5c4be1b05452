// infonce on the CPU (formula and shapes: infonce.h).
//
// The logits are visited in tiles of kTileRows x kTileKeys (1 MiB of float32) that stay in the L2
// cache: the products q . k come from the BLAS into one reused buffer, then each row of the tile is
// visited by one thread. Backward computes the products again, turns them into ds in place and
// multiplies it by the keys (dq) and the queries (dk). A row's result depends on that row alone and
// dk is summed in the order of the row blocks, so our loops give the same bits for any number of
// threads.
//
// The target of a row is left out of the vectorized loops and added by itself: it is never masked
// and has a correction of its own.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/simd.h"
#include "infonce/infonce.h"

namespace torchrec_pt {
namespace {

constexpr int64_t kTileRows = 256;
constexpr int64_t kTileKeys = 1024;
constexpr int64_t kLogitsPerThread = 16384;  // fewer are not worth waking a thread for

// --- one row of a tile: z_j = q . k_j, s_j = z_j / tau + shift_j; a masked z_j is -inf ----------

template <typename T>
struct ExpSums {
  T sum;  // sum_j exp(s_j - max)
  T dot;  // sum_j exp(s_j - max) z_j
};

template <typename T>
TORCHREC_PT_INLINE T max_logit_loop(const T* z, const T* shift, int64_t size, T inverse_tau) {
  T highest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < size; ++j) {
    const T s = z[j] * inverse_tau + shift[j];
    highest = s > highest ? s : highest;
  }
  return highest;
}

template <typename T>
TORCHREC_PT_INLINE ExpSums<T> exp_sums_loop(const T* z, const T* shift, int64_t size, T inverse_tau,
                                            T highest) {
  T sum = 0;
  T dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t j = 0; j < size; ++j) {
    const T e = fast_exp(z[j] * inverse_tau + shift[j] - highest);
    sum += e;
    dot += e == 0 ? 0 : e * z[j];  // 0 * -inf would be NaN
  }
  return {sum, dot};
}

template <typename T>
TORCHREC_PT_INLINE void softmax_loop(T* z, const T* shift, int64_t size, T inverse_tau, T lse,
                                     T grad) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    z[j] = grad * fast_exp(z[j] * inverse_tau + shift[j] - lse);
  }
}

template <typename T>
TORCHREC_PT_INLINE void mask_equal_loop(T* z, const int64_t* ids, int64_t size, int64_t id) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    z[j] = ids[j] == id ? -std::numeric_limits<T>::infinity() : z[j];
  }
}

TORCHREC_PT_CLONES float max_logit(const float* z, const float* shift, int64_t size,
                                   float inverse_tau) {
  return max_logit_loop(z, shift, size, inverse_tau);
}
TORCHREC_PT_CLONES ExpSums<float> exp_sums(const float* z, const float* shift, int64_t size,
                                           float inverse_tau, float highest) {
  return exp_sums_loop(z, shift, size, inverse_tau, highest);
}
TORCHREC_PT_CLONES void softmax(float* z, const float* shift, int64_t size, float inverse_tau,
                                float lse, float grad) {
  softmax_loop(z, shift, size, inverse_tau, lse, grad);
}
TORCHREC_PT_CLONES void mask_equal(float* z, const int64_t* ids, int64_t size, int64_t id) {
  mask_equal_loop(z, ids, size, id);
}

// float64 is for gradcheck: compiled once.
double max_logit(const double* z, const double* shift, int64_t size, double inverse_tau) {
  return max_logit_loop(z, shift, size, inverse_tau);
}
ExpSums<double> exp_sums(const double* z, const double* shift, int64_t size, double inverse_tau,
                         double highest) {
  return exp_sums_loop(z, shift, size, inverse_tau, highest);
}
void softmax(double* z, const double* shift, int64_t size, double inverse_tau, double lse,
             double grad) {
  softmax_loop(z, shift, size, inverse_tau, lse, grad);
}
void mask_equal(double* z, const int64_t* ids, int64_t size, int64_t id) {
  mask_equal_loop(z, ids, size, id);
}

// --- tiles --------------------------------------------------------------------------------------

// Rows of a matrix in the dtype of the computation; no copy where they already are that.
at::Tensor rows_of(const at::Tensor& matrix, int64_t first, int64_t count, at::ScalarType dtype) {
  return matrix.narrow(0, first, count).to(dtype).contiguous();
}

OptionalTensor contiguous(const OptionalTensor& vector) {
  return vector ? OptionalTensor(vector->contiguous()) : std::nullopt;
}

template <typename T>
const T* data_or_null(const OptionalTensor& vector) {
  return vector ? vector->const_data_ptr<T>() : nullptr;
}

// What the loops read besides the products.
template <typename T>
class Logits {
 public:
  explicit Logits(const InfonceProblem& problem)
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
        products_(at::empty({kTileRows * std::min(kTileKeys, num_keys)}, dtype())) {
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
    auto z = products_.narrow(0, 0, queries.size(0) * keys.size(0))
                 .view({queries.size(0), keys.size(0)});
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

template <typename Visit>
void for_each_row(int64_t num_rows, int64_t num_keys, const Visit& visit) {
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(1, num_keys));
  at::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) visit(row);
  });
}

// --- forward ------------------------------------------------------------------------------------

// The online logsumexp of one row.
template <typename T>
struct RowState {
  T highest = -std::numeric_limits<T>::infinity();
  T sum = 0;
  T dot = 0;
  T positive_dot = 0;

  void merge(T other_highest, T other_sum, T other_dot) {
    if (other_sum == 0) return;  // every key was masked
    const T merged = std::max(highest, other_highest);
    const T scale = std::exp(highest - merged);
    const T other_scale = std::exp(other_highest - merged);
    sum = sum * scale + other_sum * other_scale;
    dot = dot * scale + other_dot * other_scale;
    highest = merged;
  }
};

template <typename T>
void forward_tile(const Logits<T>& logits, at::Tensor z, int64_t first_row, int64_t first_key,
                  std::vector<RowState<T>>& states) {
  const int64_t num_keys = z.size(1);
  T* data = z.mutable_data_ptr<T>();
  for_each_row(z.size(0), num_keys, [&](int64_t r) {
    const int64_t row = first_row + r;
    T* z_row = data + r * num_keys;
    if (logits.has_target() && logits.in_tile(logits.target(row), first_key, num_keys)) {
      states[r].positive_dot = z_row[logits.target(row) - first_key];
    }
    logits.mask(z_row, row, first_key, num_keys);
    const T* shift = logits.shift(first_key);
    const T highest = max_logit(z_row, shift, num_keys, logits.inverse_tau);
    // Where every key of the tile is masked there is no maximum to subtract.
    const T subtracted = highest == -std::numeric_limits<T>::infinity() ? 0 : highest;
    const auto [sum, dot] = exp_sums(z_row, shift, num_keys, logits.inverse_tau, subtracted);
    states[r].merge(subtracted, sum, dot);
  });
}

template <typename T>
void forward(const InfonceProblem& problem, at::Tensor& lse, at::Tensor& positive,
             at::Tensor& expected_dot, at::Tensor& positive_dot) {
  const Logits<T> logits(problem);
  T* lse_data = lse.mutable_data_ptr<T>();
  T* positive_data = positive.mutable_data_ptr<T>();
  T* expected_dot_data = expected_dot.mutable_data_ptr<T>();
  T* positive_dot_data = positive_dot.mutable_data_ptr<T>();
  for (int64_t first_row = 0; first_row < logits.num_rows; first_row += kTileRows) {
    const int64_t num_rows = std::min(kTileRows, logits.num_rows - first_row);
    const auto queries = logits.queries(first_row, num_rows);
    std::vector<RowState<T>> states(num_rows);
    for (int64_t first_key = 0; first_key < logits.num_keys; first_key += kTileKeys) {
      const int64_t num_keys = std::min(kTileKeys, logits.num_keys - first_key);
      const auto keys = logits.keys(first_key, num_keys);
      forward_tile(logits, logits.products(queries, keys), first_row, first_key, states);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      RowState<T>& state = states[r];
      const int64_t row = first_row + r;
      if (logits.has_target()) {
        const T logit = logits.positive_logit(row, state.positive_dot);
        state.merge(logit, 1, state.positive_dot);
        positive_data[row] = logit;
        positive_dot_data[row] = state.positive_dot;
      }
      lse_data[row] = state.highest + std::log(state.sum);
      expected_dot_data[row] = state.sum == 0 ? 0 : state.dot / state.sum;
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> infonce_forward_cpu(
    const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& target,
    const at::Tensor& temperature, const OptionalTensor& log_q, const OptionalTensor& key_ids,
    const OptionalTensor& query_ids, const OptionalTensor& key_query_ids,
    const OptionalTensor& self_index, const OptionalTensor& log_q_positive,
    const OptionalTensor& key_bias) {
  const InfonceProblem problem{query,      keys,           target,    temperature,
                               log_q,      key_ids,        query_ids, key_query_ids,
                               self_index, log_q_positive, key_bias};
  check_infonce(problem);
  const bool is_double = query.scalar_type() == at::kDouble;
  const auto options = query.options().dtype(is_double ? at::kDouble : at::kFloat);
  auto lse = at::empty({query.size(0)}, options);
  auto positive = at::zeros_like(lse);
  auto expected_dot = at::empty_like(lse);
  auto positive_dot = at::zeros_like(lse);
  if (is_double) {
    forward<double>(problem, lse, positive, expected_dot, positive_dot);
  } else {
    forward<float>(problem, lse, positive, expected_dot, positive_dot);
  }
  return {lse, positive, expected_dot, positive_dot};
}

// --- backward -----------------------------------------------------------------------------------

template <typename T>
struct Upstream {
  const T* lse;
  const T* grad_lse;
  const T* grad_positive;

  // Such a row takes part in no gradient, even where its logits are NaN.
  bool is_zero(int64_t row) const {
    return (grad_lse[row] == 0 && grad_positive[row] == 0) ||
           lse[row] == -std::numeric_limits<T>::infinity();
  }
};

// z becomes ds_ij = grad_lse_i p_ij + grad_positive_i [j = t_i].
template <typename T>
void backward_tile(const Logits<T>& logits, const Upstream<T>& upstream, at::Tensor z,
                   int64_t first_row, int64_t first_key) {
  const int64_t num_keys = z.size(1);
  T* data = z.mutable_data_ptr<T>();
  for_each_row(z.size(0), num_keys, [&](int64_t r) {
    const int64_t row = first_row + r;
    T* z_row = data + r * num_keys;
    if (upstream.is_zero(row)) {
      std::fill(z_row, z_row + num_keys, T(0));
      return;
    }
    const int64_t t = logits.has_target() ? logits.target(row) - first_key : -1;
    const bool has_positive = t >= 0 && t < num_keys;
    const T positive_dot = has_positive ? z_row[t] : 0;
    logits.mask(z_row, row, first_key, num_keys);
    softmax(z_row, logits.shift(first_key), num_keys, logits.inverse_tau, upstream.lse[row],
            upstream.grad_lse[row]);
    if (has_positive) {
      const T p = std::exp(logits.positive_logit(row, positive_dot) - upstream.lse[row]);
      z_row[t] = upstream.grad_lse[row] * p + upstream.grad_positive[row];
    }
  });
}

// The queries of a block, with zeros in the rows without upstream: 0 * inf would reach dk as NaN.
template <typename T>
at::Tensor live_queries(const Logits<T>& logits, const Upstream<T>& upstream, int64_t first_row,
                        int64_t num_rows) {
  auto queries = logits.queries(first_row, num_rows);
  bool is_copy = false;
  for (int64_t r = 0; r < num_rows; ++r) {
    if (!upstream.is_zero(first_row + r)) continue;
    if (!is_copy) queries = queries.clone();
    is_copy = true;
    queries.select(0, r).zero_();
  }
  return queries;
}

template <typename T>
void backward(const InfonceProblem& problem, const Upstream<T>& upstream, at::Tensor& grad_query,
              at::Tensor& grad_keys, at::Tensor& grad_key_bias) {
  const Logits<T> logits(problem);
  const at::Scalar scale(logits.inverse_tau);
  for (int64_t first_row = 0; first_row < logits.num_rows; first_row += kTileRows) {
    const int64_t num_rows = std::min(kTileRows, logits.num_rows - first_row);
    const auto queries = live_queries(logits, upstream, first_row, num_rows);
    auto grad_queries = grad_query.narrow(0, first_row, num_rows);
    for (int64_t first_key = 0; first_key < logits.num_keys; first_key += kTileKeys) {
      const int64_t num_keys = std::min(kTileKeys, logits.num_keys - first_key);
      const auto keys = logits.keys(first_key, num_keys);
      const auto ds = logits.products(queries, keys);
      backward_tile(logits, upstream, ds, first_row, first_key);
      grad_queries.addmm_(ds, keys, 1, scale);
      grad_keys.narrow(0, first_key, num_keys).addmm_(ds.t(), queries, 1, scale);
      if (problem.key_bias) grad_key_bias.narrow(0, first_key, num_keys).add_(ds.sum(0));
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> infonce_backward_cpu(
    const at::Tensor& grad_lse, const at::Tensor& grad_positive, const at::Tensor& lse,
    const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& target,
    const at::Tensor& temperature, const OptionalTensor& log_q, const OptionalTensor& key_ids,
    const OptionalTensor& query_ids, const OptionalTensor& key_query_ids,
    const OptionalTensor& self_index, const OptionalTensor& log_q_positive,
    const OptionalTensor& key_bias) {
  const InfonceProblem problem{query,      keys,           target,    temperature,
                               log_q,      key_ids,        query_ids, key_query_ids,
                               self_index, log_q_positive, key_bias};
  check_infonce(problem);
  const auto options = lse.options();
  auto grad_query = at::zeros(query.sizes(), options);
  auto grad_keys = at::zeros(keys.sizes(), options);
  auto grad_key_bias = at::zeros({key_bias ? keys.size(0) : 0}, options);
  AT_DISPATCH_FLOATING_TYPES(lse.scalar_type(), "infonce_backward", [&] {
    const auto grad_lse_row = grad_lse.to(lse.scalar_type()).contiguous();
    const auto grad_positive_row = grad_positive.to(lse.scalar_type()).contiguous();
    const auto lse_row = lse.contiguous();
    const Upstream<scalar_t> upstream{lse_row.const_data_ptr<scalar_t>(),
                                      grad_lse_row.const_data_ptr<scalar_t>(),
                                      grad_positive_row.const_data_ptr<scalar_t>()};
    backward<scalar_t>(problem, upstream, grad_query, grad_keys, grad_key_bias);
  });
  return {grad_query.to(query.scalar_type()), grad_keys.to(keys.scalar_type()),
          key_bias ? grad_key_bias.to(key_bias->scalar_type()) : grad_key_bias};
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) {
  m.impl("infonce_forward", &infonce_forward_cpu);
  m.impl("infonce_backward", &infonce_backward_cpu);
}

}  // namespace
}  // namespace torchrec_pt
