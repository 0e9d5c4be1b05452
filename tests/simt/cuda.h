// Stands in for the CUDA headers: a .cu file that includes this compiles with g++, and simt::launch
// runs its kernels on the CPU (README.md).

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "simt/async_copy.h"
#include "simt/atomics.h"
#include "simt/launch.h"
#include "simt/numbers.h"
#include "simt/tensor_core.h"
#include "simt/types.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())
inline constexpr int warpSize = 32;

using std::max;
using std::min;

template <typename T>
T __ldg(const T* address) {
  return *address;
}

[[noreturn]] inline void __trap(simt::Site site = simt::Site::current()) { simt::trap(site); }

// Products that no compiler fuses with a sum. Ours has no reason to: it makes no FMA by itself.
inline float __fmul_rn(float a, float b) { return a * b; }

inline std::int32_t __float_as_int(float x) { return std::bit_cast<std::int32_t>(x); }
inline std::uint32_t __float_as_uint(float x) { return std::bit_cast<std::uint32_t>(x); }
inline float __int_as_float(std::int32_t x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(std::uint32_t x) { return std::bit_cast<float>(x); }

// A macro, because newer C libraries declare a function of this name.
#define rsqrtf(x) (1.0f / std::sqrt(static_cast<float>(x)))
