// Four consecutive values of a row, whatever they are stored as.

#pragma once

#include "device/cuda.cuh"
#include "sampled_softmax/sampled_softmax_device.h"

namespace torchrec_pt::device {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T values[4];
};

// row[first ... first + 3], 0 from `size` on. With vectors, size is a multiple of 4 and the row
// aligned to four values.
template <typename T>
__device__ __forceinline__ void load_quad(float (&quad)[4], const T* row, std::int64_t stride,
                                          int first, int size, bool has_vectors) {
  if (has_vectors) {
    Quad<T> loaded{};
    if (first < size) loaded = *reinterpret_cast<const Quad<T>*>(row + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) quad[i] = to_float(loaded.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      quad[i] = first + i < size ? to_float(row[(first + i) * stride]) : 0;
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_quad(T* row, const float (&quad)[4], int first, int size,
                                           bool has_vectors) {
  if (has_vectors) {
    Quad<T> stored;
#pragma unroll
    for (int i = 0; i < 4; ++i) stored.values[i] = from_float<T>(quad[i]);
    *reinterpret_cast<Quad<T>*>(row + first) = stored;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < size) row[first + i] = from_float<T>(quad[i]);
    }
  }
}

// Calls run.operator()<T>() for the type that is stored.
template <typename Run>
int dispatch(Stored stored, const Run& run) {
  switch (stored) {
    case Stored::kFloat32:
      return run.template operator()<float>();
    case Stored::kBfloat16:
      return run.template operator()<__nv_bfloat16>();
    case Stored::kFloat16:
      return run.template operator()<__half>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace torchrec_pt::device
