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

#include <ATen/core/Tensor.h>

#include <optional>

namespace torchrec_pt {

using OptionalTensor = std::optional<at::Tensor>;

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

// Raise ValueError with one line where shapes, dtypes, devices or combinations are wrong.
void check_infonce(const InfonceProblem& problem);
void check_infonce_symmetric(const InfonceProblem& problem, const OptionalTensor& row_weight);

}  // namespace torchrec_pt
