// Where the operators meet CUDA: device, stream and errors. Built for the executor of tests/simt,
// the operators run on CPU tensors instead.

#pragma once

#ifdef TORCHREC_PT_SIMT
#include "simt/torch_cuda.h"
#else
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#define TORCHREC_PT_DEVICE_KEY CUDA

namespace torchrec_pt {

// While it lives, the tensor's device is current and its current stream takes the kernels.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& tensor)
      : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream()) {}

  CUstream_st* stream() const { return stream_.stream(); }

  // Column sums of so many tiles of rows are kept at a time.
  static constexpr int kColumnTiles = 64;

  // Blocks of kernels of which two fit on a multiprocessor that run at once.
  int num_blocks() const { return 2 * at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

inline void check_launch(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

}  // namespace torchrec_pt
#endif
