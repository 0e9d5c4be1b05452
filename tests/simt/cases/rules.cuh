// Small kernels, each of which keeps a rule of CUDA, or with kBroken breaks it.

#pragma once

#include "device/ptx.cuh"

namespace cases {

namespace device = torchrec_pt::device;

// out[block] = the sum of the block's part of `values`; blocks of a power of two of warps.
template <bool kBroken>
__global__ void sum_blocks(const float* values, float* out, int num) {
  float* partial = reinterpret_cast<float*>(device::dynamic_shared());
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < num ? __ldg(values + i) : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (!kBroken) __syncthreads();
  if (threadIdx.x >= 32) return;
  const int num_warps = blockDim.x / 32;
  sum = static_cast<int>(threadIdx.x) < num_warps ? partial[threadIdx.x] : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Copies through two buffers; what is past the end becomes 0.
enum class CopyFault { kNone, kNoWait, kNoWaitAtAll, kNoCommit, kNoBarrier };

template <CopyFault kFault>
__global__ void copy_through(const float* in, float* out, int num, int num_padded) {
  float4* buffer = reinterpret_cast<float4*>(device::dynamic_shared());
  const auto begin = [&](int chunk) {
    const int i = (chunk * blockDim.x + threadIdx.x) * 4;
    const int num_valid = max(0, min(4, num - i)) * 4;
    device::copy_async<16>(buffer + chunk % 2 * blockDim.x + threadIdx.x,
                           in + (num_valid > 0 ? i : 0), num_valid);
    if (kFault != CopyFault::kNoCommit) device::copy_async_commit();
  };
  const int num_chunks = num_padded / 4 / blockDim.x;
  begin(0);
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    if (chunk + 1 < num_chunks) {
      begin(chunk + 1);
      if (kFault != CopyFault::kNoWait) device::copy_async_wait<1>();
    } else {
      if (kFault != CopyFault::kNoWaitAtAll) device::copy_async_wait<0>();
    }
    __syncthreads();
    // Another thread's copy, so that the barriers matter.
    const int other = blockDim.x - 1 - threadIdx.x;
    if (kFault != CopyFault::kNoWaitAtAll) {
      reinterpret_cast<float4*>(out)[chunk * blockDim.x + other] =
          buffer[chunk % 2 * blockDim.x + other];
    }
    if (kFault != CopyFault::kNoBarrier) __syncthreads();
  }
}

// Each lane reads what its neighbour wrote: the warp's barrier orders the two.
template <bool kBroken>
__global__ void exchange_in_warp(float* out) {
  float* shared = reinterpret_cast<float*>(device::dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  if (!kBroken) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// More barriers than an epoch has bits for.
template <bool kBroken>
__global__ void many_barriers(int* out, int num_block, int num_warp) {
  int* shared = reinterpret_cast<int*>(device::dynamic_shared());
  shared[threadIdx.x] = 0;
  for (int i = 0; i < num_warp; ++i) {
    __syncwarp();
    const int neighbour = shared[threadIdx.x ^ 1];
    __syncwarp();
    shared[threadIdx.x] = neighbour + 1;
  }
  for (int i = 0; i < num_block; ++i) {
    __syncthreads();
    const int opposite = shared[blockDim.x - 1 - threadIdx.x];
    if (!kBroken || i + 1 < num_block) __syncthreads();
    shared[threadIdx.x] = opposite + 1;
  }
  out[threadIdx.x] = shared[threadIdx.x];
}

// Counts in shared and in global memory.
template <bool kBroken>
__global__ void count(int* bins) {
  int* shared = reinterpret_cast<int*>(device::dynamic_shared());
  if (threadIdx.x < 8) shared[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&shared[threadIdx.x % 8], 1);
  if (kBroken && threadIdx.x == 5) shared[5] += 1;
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&bins[threadIdx.x], shared[threadIdx.x]);
}

template <bool kBroken>
__global__ void write_own_row(float* out) {
  out[(kBroken ? 0 : blockIdx.x) * blockDim.x + threadIdx.x] = 1.0f;
}

// A block reads what the one before it writes, in whatever order they run.
__global__ void read_other_block(float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&out[i], 1.0f);
  out[gridDim.x * blockDim.x + i] = out[(i + blockDim.x) % (gridDim.x * blockDim.x)];
}

enum class BarrierFault { kExited, kTwoPlaces };

template <BarrierFault kFault>
__global__ void diverge_at_barrier() {
  if (kFault == BarrierFault::kExited) {
    if (threadIdx.x == 40) return;
    __syncthreads();
  } else {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
}

enum class CollectiveFault { kBarrier, kExited, kTwoKinds, kTwoPlaces, kMask, kSource };

template <CollectiveFault kFault>
__global__ void diverge_in_warp(float* out) {
  const std::uint32_t all = 0xffffffff;
  float value = threadIdx.x;
  if (kFault == CollectiveFault::kBarrier) {
    if (threadIdx.x == 3) __syncthreads();
    value = __shfl_xor_sync(all, value, 1);
  } else if (kFault == CollectiveFault::kExited) {
    if (threadIdx.x == 3) return;
    value = __shfl_xor_sync(all, value, 1);
  } else if (kFault == CollectiveFault::kTwoKinds) {
    if (threadIdx.x == 3) {
      value = __any_sync(all, 1);
    } else {
      value = __shfl_xor_sync(all, value, 1);
    }
  } else if (kFault == CollectiveFault::kTwoPlaces) {
    std::uint32_t r[4];
    if (threadIdx.x == 3) {
      device::load_matrices(r, device::dynamic_shared());
    } else {
      device::load_matrices(r, device::dynamic_shared());
    }
    value = r[0];
  } else if (kFault == CollectiveFault::kMask) {
    value = __shfl_xor_sync(0xfffffff0, value, 1);
  } else {
    if (threadIdx.x < 16) value = __shfl_sync(0xffff, value, 16);
  }
  out[threadIdx.x] = value;
}

enum class MemoryFault { kReadPastEnd, kWriteBefore, kMisaligned, kTrap };

template <MemoryFault kFault>
__global__ void touch_wrongly(float* out) {
  float* shared = reinterpret_cast<float*>(device::dynamic_shared());
  shared[threadIdx.x] = 0.0f;
  __syncthreads();
  if (kFault == MemoryFault::kReadPastEnd) out[threadIdx.x] = shared[threadIdx.x + 1];
  if (kFault == MemoryFault::kWriteBefore && threadIdx.x == 7) shared[-1] = 0.0f;
  if (kFault == MemoryFault::kMisaligned && threadIdx.x == 1) {
    reinterpret_cast<float4*>(out)[0] = *reinterpret_cast<float4*>(shared + threadIdx.x);
  }
  if (kFault == MemoryFault::kTrap && threadIdx.x == 9) __trap();
}

template <typename T>
__global__ void read_past_end(const T* in, T* out, int num) {
  out[threadIdx.x] = in[num];
}

__global__ void copy_past_end(const float* in, int num) {
  float4* shared = reinterpret_cast<float4*>(device::dynamic_shared());
  device::copy_async<16>(shared + threadIdx.x, in + num, 16);
  device::copy_async_commit();
  device::copy_async_wait<0>();
}

// 3 of 4 quarters of a block of 48 threads vote: a warp may be partial, and so may a mask.
__global__ void vote(unsigned* out) {
  const unsigned i = threadIdx.x;
  unsigned result = __ballot_sync(0xffffffff, i % 3 == 0);
  if (i % 32 < 8) result ^= static_cast<unsigned>(__all_sync(0xff, i % 32 < 8)) << 30;
  if (i % 32 < 8) result ^= static_cast<unsigned>(__any_sync(0xff, i % 32 == 8)) << 31;
  out[i] = result;
}

__global__ void where_am_i(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned num_threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * num_threads + thread] = block * num_threads + thread;
}

}  // namespace cases
