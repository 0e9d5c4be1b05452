// The symmetric infonce on the CPU (formula and shapes: infonce.h).
//
//   ds_ij = (g_i (p_ij - [i = j]) + g_j [j < B] (c_ij - [i = j])) / 2
//   p_ij = exp(s_ij - lse_i),  c_ij = exp(q_i . k_j / tau - column_lse_j)
//
// The logits are visited in tiles, as in infonce_cpu.cpp. Forward makes one product: each row of a
// tile is visited by one thread, then each column, whose maximum and sums are kept online from row
// block to row block. Backward makes three: the products again, which become ds in place, and ds
// times the keys (dq) and the queries (dk). A row, a column and dk are each summed in the order of
// the tiles, so our loops give the same bits for any number of threads.
//
// The diagonal is left out of the vectorized loops and added by itself: it is never masked.

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "infonce/infonce_logits.h"

namespace torchrec_pt {
namespace {

// Rows of weight 0 are dead: no loss, no gradient, no negative of a column, whatever they hold.
class DeadRows {
 public:
  explicit DeadRows(const OptionalTensor& row_weight)
      : is_dead_(row_weight ? OptionalTensor(row_weight->eq(0).contiguous()) : std::nullopt) {}

  bool operator()(int64_t row) const { return is_dead_ && is_dead_->const_data_ptr<bool>()[row]; }

  // 0 in the dead rows.
  at::Tensor clear(const at::Tensor& rows) const {
    return is_dead_ ? rows.masked_fill(*is_dead_, 0) : rows;
  }

 private:
  OptionalTensor is_dead_;
};

// --- forward ------------------------------------------------------------------------------------

// Of each column j < B: the online logsumexp of the rows visited, without the diagonal.
template <typename T>
struct Columns {
  explicit Columns(int64_t num_columns)
      // Finite, so that a column without a row yet needs no case of its own: exp(-inf - it) is 0.
      : highest_dot(num_columns, std::numeric_limits<T>::lowest()),
        sum(num_columns),
        dot(num_columns) {}

  std::vector<T> highest_dot;  // max_r z_rj
  std::vector<T> sum;          // sum_r exp((z_rj - highest_dot_j) / tau)
  std::vector<T> dot;          // sum_r exp((z_rj - highest_dot_j) / tau) z_rj
};

// Merges the columns from begin to end of a tile whose corner is (first_row, first_key).
template <typename T>
void visit_columns(const at::Tensor& z, const DeadRows& is_dead, int64_t first_row,
                   int64_t first_key, T inverse_tau, int64_t begin, int64_t end,
                   Columns<T>& columns) {
  const int64_t count = end - begin;
  T* highest = columns.highest_dot.data() + first_key + begin;
  T* sum = columns.sum.data() + first_key + begin;
  T* dot = columns.dot.data() + first_key + begin;
  const auto for_each_live_row = [&](const auto& visit) {
    for (int64_t r = 0; r < z.size(0); ++r) {
      if (!is_dead(first_row + r)) visit(z.const_data_ptr<T>() + r * z.stride(0) + begin);
    }
  };
  const std::vector<T> previous(highest, highest + count);
  for_each_live_row([&](const T* z_row) { column_max(z_row, count, highest); });
  for (int64_t j = 0; j < count; ++j) {
    if (previous[j] == highest[j]) continue;
    const T scale = std::exp((previous[j] - highest[j]) * inverse_tau);
    sum[j] *= scale;
    dot[j] *= scale;
  }
  for_each_live_row(
      [&](const T* z_row) { add_column_exps(z_row, highest, count, inverse_tau, sum, dot); });
}

template <typename T>
void forward_tile(const Logits<T>& logits, const DeadRows& is_dead, at::Tensor z, int64_t first_row,
                  int64_t first_key, std::vector<RowState<T>>& rows, Columns<T>& columns) {
  T* data = z.mutable_data_ptr<T>();
  for_each_row(z.size(0), z.size(1), [&](int64_t r) {
    if (is_dead(first_row + r)) return;
    visit_row(logits, data + r * z.stride(0), first_row + r, first_key, z.size(1),
              rows[first_row + r]);
  });
  const int64_t num_columns = std::min(z.size(1), logits.num_rows - first_key);
  for_each_range(num_columns, z.size(0), [&](int64_t begin, int64_t end) {
    visit_columns(z, is_dead, first_row, first_key, logits.inverse_tau, begin, end, columns);
  });
}

template <typename T>
void forward(const InfonceProblem& problem, const DeadRows& is_dead, at::Tensor& loss,
             at::Tensor& lse, at::Tensor& column_lse, at::Tensor& slope) {
  const Logits<T> logits(problem, kTileRows, kTileKeys);
  Columns<T> columns(logits.num_rows);
  std::vector<RowState<T>> rows(logits.num_rows);
  for (int64_t first_row = 0; first_row < logits.num_rows; first_row += kTileRows) {
    const int64_t num_rows = std::min(kTileRows, logits.num_rows - first_row);
    const auto queries = logits.queries(first_row, num_rows);
    for (int64_t first_key = 0; first_key < logits.num_keys; first_key += kTileKeys) {
      const int64_t num_keys = std::min(kTileKeys, logits.num_keys - first_key);
      const auto z = logits.products(queries, logits.keys(first_key, num_keys));
      forward_tile(logits, is_dead, z, first_row, first_key, rows, columns);
    }
  }
  T* loss_data = loss.mutable_data_ptr<T>();
  T* lse_data = lse.mutable_data_ptr<T>();
  T* column_lse_data = column_lse.mutable_data_ptr<T>();
  T* slope_data = slope.mutable_data_ptr<T>();
  for (int64_t i = 0; i < logits.num_rows; ++i) {
    if (is_dead(i)) continue;
    auto [row, positive_dot] = rows[i];
    const T positive = logits.positive_logit(i, positive_dot);
    row.merge(positive, 1, positive_dot);
    LogSumExp<T> column{columns.highest_dot[i] * logits.inverse_tau, columns.sum[i],
                        columns.dot[i]};
    column.merge(positive_dot * logits.inverse_tau, 1, positive_dot);
    lse_data[i] = row.value();
    column_lse_data[i] = column.value();
    loss_data[i] =
        (row.value() - positive + column.value() - positive_dot * logits.inverse_tau) / 2;
    // s = q.k / tau + ..., so ds / dtau = -q.k / tau^2.
    slope_data[i] = -(row.expected_dot() + column.expected_dot() - 2 * positive_dot) *
                    logits.inverse_tau * logits.inverse_tau / 2;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> infonce_symmetric_forward_cpu(
    const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& row_weight,
    const at::Tensor& temperature, const OptionalTensor& log_q, const OptionalTensor& key_ids,
    const OptionalTensor& query_ids, const OptionalTensor& key_query_ids,
    const OptionalTensor& self_index, const OptionalTensor& log_q_positive,
    const OptionalTensor& key_bias) {
  const InfonceProblem problem{query,      keys,           std::nullopt, temperature,
                               log_q,      key_ids,        query_ids,    key_query_ids,
                               self_index, log_q_positive, key_bias};
  check_infonce_symmetric(problem, row_weight);
  const auto dtype = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto loss = at::zeros({query.size(0)}, query.options().dtype(dtype));
  auto lse = at::zeros_like(loss);
  auto column_lse = at::zeros_like(loss);
  auto slope = at::zeros_like(loss);
  AT_DISPATCH_FLOATING_TYPES(dtype, "infonce_symmetric_forward", [&] {
    forward<scalar_t>(with_diagonal_target(problem), DeadRows(row_weight), loss, lse, column_lse,
                      slope);
  });
  return {loss, lse, column_lse, slope};
}

// --- backward -----------------------------------------------------------------------------------

// The vectors that all tiles read, with one entry a key: none of a dead row, none from B on.
struct Upstream {
  Upstream(const at::Tensor& grad_loss, const at::Tensor& row_lse, const at::Tensor& pair_lse,
           const DeadRows& is_dead, int64_t num_keys)
      : half_grad(at::constant_pad_nd(is_dead.clear(grad_loss.to(row_lse.scalar_type())) / 2,
                                      {0, num_keys - row_lse.size(0)})),
        lse(row_lse.contiguous()),
        // exp(z / tau - inf) is 0, where another number could give 0 * inf.
        column_lse(at::constant_pad_nd(pair_lse, {0, num_keys - row_lse.size(0)})
                       .masked_fill_(half_grad == 0, std::numeric_limits<double>::infinity())) {}

  at::Tensor half_grad;   // (N,) g_j / 2
  at::Tensor lse;         // (B,)
  at::Tensor column_lse;  // (N,)
};

// z becomes ds.
template <typename T>
void backward_tile(const Logits<T>& logits, const Upstream& upstream, const DeadRows& is_dead,
                   at::Tensor z, int64_t first_row, int64_t first_key) {
  const int64_t num_keys = z.size(1);
  T* data = z.mutable_data_ptr<T>();
  const T* half_grad = upstream.half_grad.const_data_ptr<T>();
  const T* lse = upstream.lse.const_data_ptr<T>();
  const T* column_lse = upstream.column_lse.const_data_ptr<T>();
  for_each_row(z.size(0), num_keys, [&](int64_t r) {
    const int64_t row = first_row + r;
    T* z_row = data + r * z.stride(0);
    if (is_dead(row)) {
      std::fill(z_row, z_row + num_keys, T(0));
      return;
    }
    const bool has_positive = logits.in_tile(row, first_key, num_keys);
    const T positive_dot = has_positive ? z_row[row - first_key] : 0;
    logits.mask(z_row, row, first_key, num_keys);
    softmax_both(z_row, logits.shift(first_key), column_lse + first_key, half_grad + first_key,
                 num_keys, logits.inverse_tau, lse[row], half_grad[row]);
    if (has_positive) {
      const T p = std::exp(logits.positive_logit(row, positive_dot) - lse[row]);
      const T column_p = std::exp(positive_dot * logits.inverse_tau - column_lse[row]);
      z_row[row - first_key] = half_grad[row] * (p - 1 + column_p - 1);
    }
  });
}

template <typename T>
void backward(const InfonceProblem& problem, const Upstream& upstream, const DeadRows& is_dead,
              at::Tensor& grad_query, at::Tensor& grad_keys, at::Tensor& grad_key_bias) {
  const Logits<T> logits(problem, kTileRows, kTileKeys);
  const at::Scalar scale(logits.inverse_tau);
  for (int64_t first_row = 0; first_row < logits.num_rows; first_row += kTileRows) {
    const int64_t num_rows = std::min(kTileRows, logits.num_rows - first_row);
    const auto queries = without_dead_rows(logits.queries(first_row, num_rows),
                                           [&](int64_t r) { return is_dead(first_row + r); });
    auto grad_queries = grad_query.narrow(0, first_row, num_rows);
    for (int64_t first_key = 0; first_key < logits.num_keys; first_key += kTileKeys) {
      const int64_t num_keys = std::min(kTileKeys, logits.num_keys - first_key);
      const auto keys = logits.keys(first_key, num_keys);
      const auto ds = logits.products(queries, keys);
      backward_tile(logits, upstream, is_dead, ds, first_row, first_key);
      grad_queries.addmm_(ds, keys, 1, scale);
      grad_keys.narrow(0, first_key, num_keys).addmm_(ds.t(), queries, 1, scale);
      // The columns know no bias, and their share of this sum is g_j (sum_i c_ij - 1) / 2 = 0.
      if (problem.key_bias) grad_key_bias.narrow(0, first_key, num_keys).add_(ds.sum(0));
    }
  }
}

InfonceGradients infonce_symmetric_backward_cpu(
    const at::Tensor& grad_loss, const at::Tensor& lse, const at::Tensor& column_lse,
    const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& row_weight,
    const at::Tensor& temperature, const OptionalTensor& log_q, const OptionalTensor& key_ids,
    const OptionalTensor& query_ids, const OptionalTensor& key_query_ids,
    const OptionalTensor& self_index, const OptionalTensor& log_q_positive,
    const OptionalTensor& key_bias) {
  const InfonceProblem problem{query,      keys,           std::nullopt, temperature,
                               log_q,      key_ids,        query_ids,    key_query_ids,
                               self_index, log_q_positive, key_bias};
  check_infonce_symmetric(problem, row_weight);
  const DeadRows is_dead(row_weight);
  const Upstream upstream(grad_loss, lse, column_lse, is_dead, keys.size(0));
  const auto options = lse.options();
  auto grad_query = at::zeros(query.sizes(), options);
  auto grad_keys = at::zeros(keys.sizes(), options);
  auto grad_key_bias = at::zeros({key_bias ? keys.size(0) : 0}, options);
  AT_DISPATCH_FLOATING_TYPES(lse.scalar_type(), "infonce_symmetric_backward", [&] {
    backward<scalar_t>(with_diagonal_target(problem), upstream, is_dead, grad_query, grad_keys,
                       grad_key_bias);
  });
  return in_dtypes_of(problem, grad_query, grad_keys, grad_key_bias);
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) {
  m.impl("infonce_symmetric_forward", &infonce_symmetric_forward_cpu);
  m.impl("infonce_symmetric_backward", &infonce_symmetric_backward_cpu);
}

}  // namespace
}  // namespace torchrec_pt
