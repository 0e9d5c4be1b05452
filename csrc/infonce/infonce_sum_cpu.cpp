// The weighted sum of infonce losses on the CPU, with its gradients in the same visit (formula and
// shapes: infonce.h).
//
//   L = sum_i c_i (lse_i - s_it),  ds_ij = c_i (p_ij - [j = t])
//
// Where the upstream gradient is one number known only later, it scales everything alike, so the
// gradients can be made as soon as a row's logsumexp is known: three products in all (z = Q Kᵀ,
// dq = ds K / tau, dk = dsᵀ Q / tau), each logit visited twice (maximum; exponential and sums). A
// block of rows keeps its logits against all keys in one buffer. With so many keys that this is
// large, infonce_forward and infonce_backward do the same in tiles, with four products.
//
// The exponentials stay unnormalized: 1 / sum_i goes into the rows of dq afterwards and of Q before
// the product. dk is summed in the order of the row blocks, so our loops give the same bits for any
// number of threads.

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "infonce/infonce_logits.h"

namespace torchrec_pt {
namespace {

constexpr int64_t kBufferLogits = 1 << 22;  // 16 MiB of float32
constexpr int64_t kFewestRows = 32;
constexpr int64_t kMostRows = 256;

int64_t rows_per_block(int64_t num_rows, int64_t num_keys) {
  const int64_t fit = kBufferLogits / std::max<int64_t>(1, num_keys);
  return std::min(std::max<int64_t>(1, num_rows), std::clamp(fit, kFewestRows, kMostRows));
}

// What a visit leaves of each row of a block.
template <typename T>
struct Visited {
  explicit Visited(int64_t num_rows)
      : scale(at::empty({num_rows, 1}, Logits<T>::dtype())),
        loss(num_rows),
        grad_temperature(num_rows) {}

  at::Tensor scale;  // (R, 1): c_i / sum_i
  std::vector<T> loss;
  std::vector<T> grad_temperature;
};

// z becomes exp(s_ij - highest_i) - sum_i [j = t]: ds_ij up to the factor `scale`.
template <typename T>
void visit_block(const Logits<T>& logits, const T* coefficient, at::Tensor z, int64_t first_row,
                 Visited<T>& visited) {
  const int64_t num_keys = logits.num_keys;
  T* data = z.mutable_data_ptr<T>();
  T* scale = visited.scale.template mutable_data_ptr<T>();
  for_each_row(z.size(0), num_keys, [&](int64_t r) {
    const int64_t row = first_row + r;
    T* z_row = data + r * z.stride(0);
    if (coefficient[row] == 0) {  // takes part in nothing, even where its logits are NaN
      std::fill(z_row, z_row + num_keys, T(0));
      visited.loss[r] = scale[r] = visited.grad_temperature[r] = 0;
      return;
    }
    const int64_t t = logits.target(row);
    const T positive_dot = z_row[t];
    const T positive = logits.positive_logit(row, positive_dot);
    logits.mask(z_row, row, 0, num_keys);
    const T* shift = logits.shift(0);
    const T highest = std::max(positive, max_logit(z_row, shift, num_keys, logits.inverse_tau));
    auto [sum, dot] = exp_in_place(z_row, shift, num_keys, logits.inverse_tau, highest);
    const T positive_exp = std::exp(positive - highest);
    sum += positive_exp;
    dot += positive_exp * positive_dot;
    z_row[t] = positive_exp - sum;
    visited.loss[r] = coefficient[row] * (highest + std::log(sum) - positive);
    scale[r] = coefficient[row] / sum;
    // s = q.k / tau + ..., so ds / dtau = -q.k / tau^2.
    visited.grad_temperature[r] =
        -coefficient[row] * (dot / sum - positive_dot) * logits.inverse_tau * logits.inverse_tau;
  });
}

template <typename T>
void sum_with_gradients(const InfonceProblem& problem, const at::Tensor& coefficient,
                        at::Tensor& total, at::Tensor& grad_query, at::Tensor& grad_keys,
                        at::Tensor& grad_temperature, at::Tensor& grad_key_bias) {
  const int64_t block_rows = rows_per_block(problem.query.size(0), problem.keys.size(0));
  const Logits<T> logits(problem, block_rows, problem.keys.size(0));
  const at::Tensor keys = logits.keys(0, logits.num_keys);
  const T* coefficients = coefficient.const_data_ptr<T>();
  const at::Scalar inverse_tau(logits.inverse_tau);
  double total_loss = 0;
  double total_grad_temperature = 0;
  for (int64_t first_row = 0; first_row < logits.num_rows; first_row += block_rows) {
    const int64_t num_rows = std::min(block_rows, logits.num_rows - first_row);
    auto queries = logits.queries(first_row, num_rows);
    const auto ds = logits.products(queries, keys);
    Visited<T> visited(num_rows);
    visit_block(logits, coefficients, ds, first_row, visited);
    auto grad_queries = grad_query.narrow(0, first_row, num_rows);
    at::mm_out(grad_queries, ds, keys);
    const at::Tensor scale = visited.scale * inverse_tau;
    grad_queries.mul_(scale);
    // 0 * inf of a row without coefficient would reach dk as NaN.
    queries = at::where(visited.scale == 0, at::zeros({}, queries.options()), queries * scale);
    grad_keys.addmm_(ds.t(), queries);
    if (problem.key_bias) grad_key_bias.add_(at::mv(ds.t(), visited.scale.squeeze(1)));
    for (const T each : visited.loss) total_loss += each;
    for (const T each : visited.grad_temperature) total_grad_temperature += each;
  }
  total.fill_(total_loss);
  grad_temperature.fill_(total_grad_temperature);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> infonce_sum_cpu(
    const at::Tensor& coefficient, const at::Tensor& query, const at::Tensor& keys,
    const at::Tensor& target, const at::Tensor& temperature, const OptionalTensor& log_q,
    const OptionalTensor& key_ids, const OptionalTensor& query_ids,
    const OptionalTensor& key_query_ids, const OptionalTensor& self_index,
    const OptionalTensor& log_q_positive, const OptionalTensor& key_bias) {
  const InfonceProblem problem{query,      keys,           target,    temperature,
                               log_q,      key_ids,        query_ids, key_query_ids,
                               self_index, log_q_positive, key_bias};
  check_infonce(problem);
  const bool is_double = query.scalar_type() == at::kDouble;
  const auto dtype = is_double ? at::kDouble : at::kFloat;
  const auto coefficients = coefficient.to(dtype).contiguous();
  const auto options = query.options().dtype(dtype);
  auto total = at::empty({}, options);
  auto grad_query = at::empty(query.sizes(), options);
  auto grad_keys = at::zeros(keys.sizes(), options);
  auto grad_temperature = at::empty({}, options);
  auto grad_key_bias = at::zeros({key_bias ? keys.size(0) : 0}, options);
  AT_DISPATCH_FLOATING_TYPES(dtype, "infonce_sum", [&] {
    sum_with_gradients<scalar_t>(problem, coefficients, total, grad_query, grad_keys,
                                 grad_temperature, grad_key_bias);
  });
  return {total, grad_query, grad_keys, grad_temperature, grad_key_bias};
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) { m.impl("infonce_sum", &infonce_sum_cpu); }

}  // namespace
}  // namespace torchrec_pt
