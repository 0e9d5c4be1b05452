// The schema of negatives, and the answer to CUDA tensors where the CUDA kernels are not built.

#include <torch/library.h>

#include "device/refuse_cuda.h"

namespace torchrec_pt {
namespace {

TORCH_LIBRARY_FRAGMENT(torchrec_pt, m) {
  // Random words of counters (N, 4) int64, whose elements are words, under one key (2,).
  m.def("philox(Tensor counters, Tensor key) -> Tensor");
  // The probabilities of weights (n,) float64 as AliasColumns, and in units of 1 / (n 2^32).
  m.def("alias_table(Tensor weights) -> (Tensor columns, Tensor mass)");
  // (R, M) int64, and the log of the expected count; (R, 1) where it is uniform.
  m.def(
      "sample_negatives(Tensor rows, SymInt num_draws, SymInt num_items, SymInt seed, SymInt step, "
      "Tensor? columns, Tensor? mass, Tensor? exclude, Tensor? exclude_offsets) "
      "-> (Tensor items, Tensor log_q)");
}

#ifndef TORCHREC_PT_WITH_CUDA
constexpr char kName[] = "negatives";

TORCH_LIBRARY_IMPL(torchrec_pt, CUDA, m) {
  m.impl("philox", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
  m.impl("sample_negatives", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda<kName>>());
}
#endif

}  // namespace
}  // namespace torchrec_pt
