// Stands in for device/torch_cuda.h: the operators run on CPU tensors, their kernels in the
// executor.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

struct CUstream_st;

#define TORCHREC_PT_DEVICE_KEY CPU

namespace torchrec_pt {

class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& /*tensor*/) {}
  CUstream_st* stream() const { return nullptr; }
  static constexpr int kColumnTiles = 2;  // so that columns take several rounds
  // Few, so that small problems are split, and larger ones are not.
  int num_blocks() const { return 4; }
};

inline void check_launch(int error) { TORCH_CHECK(error == 0, "launch refused: error ", error); }

}  // namespace torchrec_pt
