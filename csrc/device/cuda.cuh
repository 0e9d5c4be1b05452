// CUDA itself under nvcc; elsewhere the executor of tests/simt, which runs the same source on the
// CPU. Kernels include this header and no other header of CUDA, and neither torch nor ATen.

#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "simt/cuda.h"
#endif

#include <cassert>
#include <cstddef>
#include <cstdint>

// Stops the kernel, and names the condition, where it does not hold.
#ifdef __CUDACC__
#define TORCHREC_PT_DEVICE_ASSERT(condition) assert(condition)
#else
#define TORCHREC_PT_DEVICE_ASSERT(condition) \
  do {                                       \
    if (!(condition)) __trap();              \
  } while (false)
#endif

namespace torchrec_pt::device {

#ifdef __CUDACC__

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// Starts kernel<<<grid, block, shared_bytes, stream>>>(arguments...).
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

#else
using simt::dynamic_shared;
using simt::launch;
#endif

}  // namespace torchrec_pt::device
