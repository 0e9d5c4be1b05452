// The schema of sampled_softmax, and the answer to CUDA tensors where the CUDA kernels are not
// built.

#include <torch/library.h>

#include "device/refuse_cuda.h"
#include "sampled_softmax/sampled_softmax.h"

namespace torchrec_pt {
namespace {

void sampled_softmax_check_shared(const at::Tensor& query, const at::Tensor& table,
                                  const at::Tensor& positive, const at::Tensor& negatives,
                                  const at::Tensor& temperature,
                                  const OptionalTensor& log_q_positive,
                                  const OptionalTensor& log_q_negatives) {
  check_sampled_softmax_shared(
      {query, table, positive, negatives, temperature, log_q_positive, log_q_negatives});
}

TORCH_LIBRARY_FRAGMENT(torchrec_pt, m) {
  // Of negatives that all rows share, whose loss is made of other operators.
  m.def(
      "sampled_softmax_check_shared(Tensor query, Tensor table, Tensor positive, Tensor negatives, "
      "Tensor temperature, Tensor? log_q_positive, Tensor? log_q_negatives) -> ()");
  // p (B, M) and direction (B, D) are empty without with_gradients. `sparse` is for autograd alone:
  // it says which of the two backward operators makes the gradient of the table.
  m.def(
      "sampled_softmax_forward(Tensor query, Tensor table, Tensor positive, Tensor negatives, "
      "Tensor temperature, Tensor? log_q_positive, Tensor? log_q_negatives, "
      "bool with_gradients, bool sparse) -> (Tensor loss, Tensor p, Tensor direction)");
  // The gradient of the table (V, D): the ids, ascending, that positive or negatives name, and
  // their rows in the dtype; or all of it.
  m.def(
      "sampled_softmax_backward_sparse(Tensor grad_loss, Tensor loss, Tensor p, Tensor query, "
      "Tensor positive, Tensor negatives, Tensor temperature, SymInt num_items, "
      "ScalarType dtype) -> (Tensor ids, Tensor rows)");
  m.def(
      "sampled_softmax_backward_dense(Tensor grad_loss, Tensor loss, Tensor p, Tensor query, "
      "Tensor positive, Tensor negatives, Tensor temperature, SymInt num_items, "
      "ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchrec_pt, CompositeExplicitAutograd, m) {
  m.impl("sampled_softmax_check_shared", &sampled_softmax_check_shared);
}

#ifndef TORCHREC_PT_WITH_CUDA
constexpr char kName[] = "sampled_softmax";

TORCH_LIBRARY_IMPL(torchrec_pt, CUDA, m) {
  m.impl("sampled_softmax_forward",
         torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
  m.impl("sampled_softmax_backward_sparse",
         torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
  m.impl("sampled_softmax_backward_dense",
         torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
}
#endif

}  // namespace
}  // namespace torchrec_pt
