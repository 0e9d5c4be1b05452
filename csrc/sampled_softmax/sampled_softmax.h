// sampled_softmax: cross-entropy of each query's positive against sampled rows of a table, which
// are read where they stand. B queries, M negatives of each, a table of V rows.
//
//   s_0 = q_b . t[positive_b] / tau - log_q_positive_b
//   s_m = q_b . t[negatives_bm] / tau - log_q_negatives_bm     unless negatives_bm is positive_b
//   loss_b = log(exp(s_0) + sum_m exp(s_m)) - s_0
//
// With p_bm = exp(s_m) / (exp(s_0) + sum_n exp(s_n)) and an upstream g_b, all gradients follow from
// p and from direction_b = sum_m p_bm (t[negatives_bm] - t[positive_b]), without the table:
//
//   dq_b = g_b direction_b / tau          dtau = -sum_b g_b q_b . direction_b / tau^2
//   dt[i] = sum_{b, m: negatives_bm = i} g_b p_bm q_b / tau
//         - sum_{b: positive_b = i} g_b (sum_m p_bm) q_b / tau       where sum_m p_bm = 1 -
//         e^-loss_b
//
// Nothing of size B x M x D is ever held.

#pragma once

#include <ATen/core/Tensor.h>

#include "tensors.h"

namespace torchrec_pt {

struct SampledSoftmaxProblem {
  at::Tensor query;                // (B, D) float
  at::Tensor table;                // (V, D) float
  at::Tensor positive;             // (B,) int64 in [0, V)
  at::Tensor negatives;            // (B, M) int64 in [0, V)
  at::Tensor temperature;          // () float, positive
  OptionalTensor log_q_positive;   // (B,) float
  OptionalTensor log_q_negatives;  // (B, M) float; +inf removes a negative
};

// What the gradient of the table is made of.
struct SampledSoftmaxUpstream {
  at::Tensor grad_loss;  // (B,)
  at::Tensor loss;       // (B,) and p (B, M) as forward returned them
  at::Tensor p;
  at::Tensor query;        // (B, D)
  at::Tensor positive;     // (B,)
  at::Tensor negatives;    // (B, M)
  at::Tensor temperature;  // ()
  int64_t num_items;       // V
};

// Raise ValueError with one line where shapes, dtypes, devices or (on the CPU) values are wrong.
void check_sampled_softmax(const SampledSoftmaxProblem& problem);
void check_sampled_softmax_shared(const SampledSoftmaxProblem& problem);  // negatives (M,)
void check_sampled_softmax(const SampledSoftmaxUpstream& upstream);

}  // namespace torchrec_pt
