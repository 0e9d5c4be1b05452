// The schema of infonce, and the answer to CUDA tensors where the CUDA kernels are not built.

#include <torch/library.h>

#include "device/refuse_cuda.h"

namespace torchrec_pt {
namespace {

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
constexpr char kName[] = "infonce";

TORCH_LIBRARY_IMPL(torchrec_pt, CUDA, m) {
  m.impl("infonce_forward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
  m.impl("infonce_backward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
  m.impl("infonce_sum", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
  m.impl("infonce_symmetric_forward",
         torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
  m.impl("infonce_symmetric_backward",
         torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
}
#endif

}  // namespace
}  // namespace torchrec_pt
