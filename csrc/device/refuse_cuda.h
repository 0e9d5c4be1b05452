// The answer to CUDA tensors where the CUDA kernels are not built.

#pragma once

#include <c10/util/Exception.h>
#include <torch/library.h>

namespace torchrec_pt {

template <const char* kOperator>
void refuse_cuda(const c10::OperatorHandle&, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, kOperator,
                              ": the CUDA kernel is not built; move the tensors to the CPU");
}

}  // namespace torchrec_pt
