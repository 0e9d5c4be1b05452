// infonce: logsumexp over the keys of one row's logits, and the logit of its positive.
//
//   s_ij  = q_i . k_j / tau + key_bias_j - log_q_j       for the allowed j other than the target
//   s_it  = q_i . k_t / tau + key_bias_t - log_q_positive_i            for the target t = t_i
//   lse_i = log sum_j exp(s_ij)
//
// The InfoNCE loss is lse_i - s_it. The symmetric loss of the pair i (t_i = i, B <= N) averages it
// with the same over column i, which knows no log_q, no log_q_positive and no key_bias:
//
//   c_ij   = q_i . k_j / tau    for j < B and the i that may see j, of a weight other than 0
//   loss_i = (lse_i - s_ii + log sum_r exp(c_ri) - c_ii) / 2
//
// Nothing of size B x N is ever held.

#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <tuple>

#include "tensors.h"

namespace torchrec_pt {

struct InfonceProblem {
  at::Tensor query;               // (B, D) float
  at::Tensor keys;                // (N, D) float
  OptionalTensor target;          // (B,) int64 in [0, N); always allowed
  at::Tensor temperature;         // () float, positive
  OptionalTensor log_q;           // (N,) float; +inf removes a key
  OptionalTensor key_ids;         // (N,) int64: no j with the id of the row's target
  OptionalTensor query_ids;       // (B,) int64: no j whose key_query_ids equals it
  OptionalTensor key_query_ids;   // (N,) int64
  OptionalTensor self_index;      // (B,) int64: not this j; outside [0, N) it masks nothing
  OptionalTensor log_q_positive;  // (B,) float
  OptionalTensor key_bias;        // (N,) float
};

// The problem of the rows of the symmetric loss: key i belongs to query i.
inline InfonceProblem with_diagonal_target(InfonceProblem problem) {
  problem.target = at::arange(problem.query.size(0), problem.query.options().dtype(at::kLong));
  return problem;
}

// Gradients of query, keys and key_bias, in the dtypes of these. Without key_bias, grad_key_bias is
// empty and stays as it is.
using InfonceGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline InfonceGradients in_dtypes_of(const InfonceProblem& problem, const at::Tensor& grad_query,
                                     const at::Tensor& grad_keys, const at::Tensor& grad_key_bias) {
  return {grad_query.to(problem.query.scalar_type()), grad_keys.to(problem.keys.scalar_type()),
          problem.key_bias ? grad_key_bias.to(problem.key_bias->scalar_type()) : grad_key_bias};
}

// Raise ValueError with one line where shapes, dtypes, devices or combinations are wrong.
void check_infonce(const InfonceProblem& problem);
void check_infonce_symmetric(const InfonceProblem& problem, const OptionalTensor& row_weight);

}  // namespace torchrec_pt
