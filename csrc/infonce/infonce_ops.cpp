// The schema of infonce, the checks that every device shares, and the answer to CUDA tensors
// where the CUDA kernel is not built.

#include <c10/util/Exception.h>
#include <torch/library.h>

#include "infonce/infonce.h"

namespace torchrec_pt {
namespace {

bool is_supported_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

void check_vector(const char* name, const OptionalTensor& vector, int64_t size, bool is_id,
                  const InfonceProblem& problem) {
  if (!vector) return;
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == size, "infonce: ", name,
                    " must have shape (", size, ",), got ", vector->sizes());
  TORCH_CHECK_VALUE(is_id ? vector->scalar_type() == at::kLong : vector->is_floating_point(),
                    "infonce: ", name, " must be ", is_id ? "int64" : "floating point", ", got ",
                    vector->scalar_type());
  TORCH_CHECK_VALUE(vector->device() == problem.query.device(), "infonce: ", name, " is on ",
                    vector->device(), " but query is on ", problem.query.device());
}

// What the losses of one and of both directions share.
void check_common(const InfonceProblem& problem) {
  const auto& [query, keys, target, temperature, log_q, key_ids, query_ids, key_query_ids,
               self_index, log_q_positive, key_bias] = problem;
  TORCH_CHECK_VALUE(query.dim() == 2 && keys.dim() == 2 && query.size(1) == keys.size(1),
                    "infonce: query must be (B, D) and keys (N, D), got ", query.sizes(), " and ",
                    keys.sizes());
  TORCH_CHECK_VALUE(
      is_supported_float(query.scalar_type()) && is_supported_float(keys.scalar_type()),
      "infonce: query and keys must be float32, bfloat16, float16 or float64, got ",
      query.scalar_type(), " and ", keys.scalar_type());
  TORCH_CHECK_VALUE((query.scalar_type() == at::kDouble) == (keys.scalar_type() == at::kDouble),
                    "infonce: float64 query and keys go together, got ", query.scalar_type(),
                    " and ", keys.scalar_type());
  TORCH_CHECK_VALUE(query.device() == keys.device(), "infonce: keys is on ", keys.device(),
                    " but query is on ", query.device());
  TORCH_CHECK_VALUE(temperature.dim() == 0 && temperature.is_floating_point(),
                    "infonce: temperature must be a float or a 0-dim floating point tensor, got ",
                    temperature.scalar_type(), " of shape ", temperature.sizes());

  const int64_t num_rows = query.size(0);
  const int64_t num_keys = keys.size(0);
  check_vector("target", target, num_rows, true, problem);
  check_vector("log_q", log_q, num_keys, false, problem);
  check_vector("key_ids", key_ids, num_keys, true, problem);
  check_vector("query_ids", query_ids, num_rows, true, problem);
  check_vector("key_query_ids", key_query_ids, num_keys, true, problem);
  check_vector("self_index", self_index, num_rows, true, problem);
  check_vector("log_q_positive", log_q_positive, num_rows, false, problem);
  check_vector("key_bias", key_bias, num_keys, false, problem);
  TORCH_CHECK_VALUE(query_ids.has_value() == key_query_ids.has_value(),
                    "infonce: query_ids and key_query_ids go together");
}

}  // namespace

void check_infonce(const InfonceProblem& problem) {
  check_common(problem);
  TORCH_CHECK_VALUE(problem.target || (!problem.key_ids && !problem.log_q_positive),
                    "infonce: key_ids and log_q_positive need a target");
}

void check_infonce_symmetric(const InfonceProblem& problem, const OptionalTensor& row_weight) {
  check_common(problem);
  TORCH_CHECK_VALUE(!problem.target,
                    "infonce: symmetric takes no target, key i belongs to query i");
  TORCH_CHECK_VALUE(problem.query.size(0) <= problem.keys.size(0),
                    "infonce: symmetric needs a key for each query, got ", problem.query.size(0),
                    " queries and ", problem.keys.size(0), " keys");
  check_vector("row_weight", row_weight, problem.query.size(0), false, problem);
}

namespace {

#ifndef TORCHREC_PT_WITH_CUDA
void refuse_cuda(const c10::OperatorHandle&, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              "infonce: the CUDA kernel is not built; move the tensors to the CPU");
}
#endif

TORCH_LIBRARY_FRAGMENT(torchrec_pt, m) {
  // expected_dot is E_p[q . k] of each row, positive_dot is q . k_t: the temperature's gradient
  // follows from them without another sweep. Without target, positive and positive_dot are 0.
  m.def(
      "infonce_forward(Tensor query, Tensor keys, Tensor? target, Tensor temperature, "
      "Tensor? log_q, Tensor? key_ids, Tensor? query_ids, Tensor? key_query_ids, "
      "Tensor? self_index, Tensor? log_q_positive, Tensor? key_bias) "
      "-> (Tensor lse, Tensor positive, Tensor expected_dot, Tensor positive_dot)");
  // ds_ij = grad_lse_i p_ij + grad_positive_i [j = t_i]. Without key_bias, grad_key_bias is empty.
  m.def(
      "infonce_backward(Tensor grad_lse, Tensor grad_positive, Tensor lse, "
      "Tensor query, Tensor keys, Tensor? target, Tensor temperature, "
      "Tensor? log_q, Tensor? key_ids, Tensor? query_ids, Tensor? key_query_ids, "
      "Tensor? self_index, Tensor? log_q_positive, Tensor? key_bias) "
      "-> (Tensor grad_query, Tensor grad_keys, Tensor grad_key_bias)");
  // sum_i coefficient_i loss_i and its gradients, in float32 (float64 for float64 inputs).
  m.def(
      "infonce_sum(Tensor coefficient, Tensor query, Tensor keys, Tensor target, "
      "Tensor temperature, Tensor? log_q, Tensor? key_ids, Tensor? query_ids, "
      "Tensor? key_query_ids, Tensor? self_index, Tensor? log_q_positive, Tensor? key_bias) "
      "-> (Tensor total, Tensor grad_query, Tensor grad_keys, Tensor grad_temperature, "
      "Tensor grad_key_bias)");
  // Both directions. A row of weight 0 has loss 0 and is no negative of a column; other weights do
  // nothing here. slope is d loss_i / d temperature.
  m.def(
      "infonce_symmetric_forward(Tensor query, Tensor keys, Tensor? row_weight, "
      "Tensor temperature, Tensor? log_q, Tensor? key_ids, Tensor? query_ids, "
      "Tensor? key_query_ids, Tensor? self_index, Tensor? log_q_positive, Tensor? key_bias) "
      "-> (Tensor loss, Tensor lse, Tensor column_lse, Tensor slope)");
  // Of grad_loss . loss; lse and column_lse as forward returned them.
  m.def(
      "infonce_symmetric_backward(Tensor grad_loss, Tensor lse, Tensor column_lse, "
      "Tensor query, Tensor keys, Tensor? row_weight, Tensor temperature, "
      "Tensor? log_q, Tensor? key_ids, Tensor? query_ids, Tensor? key_query_ids, "
      "Tensor? self_index, Tensor? log_q_positive, Tensor? key_bias) "
      "-> (Tensor grad_query, Tensor grad_keys, Tensor grad_key_bias)");
}

#ifndef TORCHREC_PT_WITH_CUDA
TORCH_LIBRARY_IMPL(torchrec_pt, CUDA, m) {
  m.impl("infonce_forward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  m.impl("infonce_backward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  m.impl("infonce_sum", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  m.impl("infonce_symmetric_forward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  m.impl("infonce_symmetric_backward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
}
#endif

}  // namespace
}  // namespace torchrec_pt
