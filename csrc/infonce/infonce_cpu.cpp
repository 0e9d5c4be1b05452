// infonce on the CPU (formula and shapes: infonce.h).
//
// The products q . k of a tile come from the BLAS into one reused buffer, then each row of the tile
// is visited by one thread. Backward computes the products again, turns them into ds in place and
// multiplies it by the keys (dq) and the queries (dk). A row's result depends on that row alone and
// dk is summed in the order of the row blocks, so our loops give the same bits for any number of
// threads.
//
// The target of a row is left out of the vectorized loops and added by itself: it is never masked
// and has a correction of its own.

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "infonce/infonce_logits.h"

namespace torchrec_pt {
namespace {

// --- forward ------------------------------------------------------------------------------------

template <typename T>
void forward_tile(const Logits<T>& logits, at::Tensor z, int64_t first_row, int64_t first_key,
                  std::vector<RowState<T>>& states) {
  T* data = z.mutable_data_ptr<T>();
  for_each_row(z.size(0), z.size(1), [&](int64_t r) {
    visit_row(logits, data + r * z.stride(0), first_row + r, first_key, z.size(1), states[r]);
  });
}

template <typename T>
void forward(const InfonceProblem& problem, at::Tensor& lse, at::Tensor& positive,
             at::Tensor& expected_dot, at::Tensor& positive_dot) {
  const Logits<T> logits(problem, kTileRows, kTileKeys);
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
      auto [all, positive_dot] = states[r];
      const int64_t row = first_row + r;
      if (logits.has_target()) {
        const T logit = logits.positive_logit(row, positive_dot);
        all.merge(logit, 1, positive_dot);
        positive_data[row] = logit;
        positive_dot_data[row] = positive_dot;
      }
      lse_data[row] = all.value();
      expected_dot_data[row] = all.expected_dot();
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
    T* z_row = data + r * z.stride(0);
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

template <typename T>
void backward(const InfonceProblem& problem, const Upstream<T>& upstream, at::Tensor& grad_query,
              at::Tensor& grad_keys, at::Tensor& grad_key_bias) {
  const Logits<T> logits(problem, kTileRows, kTileKeys);
  const at::Scalar scale(logits.inverse_tau);
  for (int64_t first_row = 0; first_row < logits.num_rows; first_row += kTileRows) {
    const int64_t num_rows = std::min(kTileRows, logits.num_rows - first_row);
    const auto queries = without_dead_rows(logits.queries(first_row, num_rows), [&](int64_t r) {
      return upstream.is_zero(first_row + r);
    });
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

InfonceGradients infonce_backward_cpu(
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
  return in_dtypes_of(problem, grad_query, grad_keys, grad_key_bias);
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) {
  m.impl("infonce_forward", &infonce_forward_cpu);
  m.impl("infonce_backward", &infonce_backward_cpu);
}

}  // namespace
}  // namespace torchrec_pt
