// C = A B by tensor cores, with fragments taken from row-major shared memory as a GEMM takes them.
//
//   A (M, K) row-major; B (N, K) row-major if kTransposed is false, else (K, N); C (M, N) float.
//
// A block of 4 warps makes 64 x 64 of C: warp w its rows 16w..16w+15. Chunks of 64 of K pass
// through two buffers by cp.async. M, N and K are multiples of 64.

#pragma once

#include "device/ptx.cuh"

namespace cases {

namespace device = torchrec_pt::device;

enum class Fault {
  kNone,
  kNoWait,               // the last chunk is read while it is on its way
  kNoBarrierBeforeRead,  // other warps' part of a chunk may not be there yet
  kNoBarrierBeforeOverwrite,
  kSwappedB,
  kMisalignedCopy,
  kMisalignedRow,
  kOneLaneTooFew,
};

inline constexpr int kTile = 64;

template <typename T>
inline constexpr int kStride = kTile + 16 / int{sizeof(T)};  // of a row in shared memory

template <typename T>
inline constexpr int kTileBytes = kTile * kStride<T> * int{sizeof(T)};

// 64 x 64 of a matrix whose rows are `stride` apart.
template <typename T, Fault kFault>
__device__ __forceinline__ void begin_tile(T* shared, const T* global, int stride) {
  constexpr int kPerCopy = 16 / int{sizeof(T)};
  constexpr int kShift = kFault == Fault::kMisalignedCopy ? 1 : 0;
  for (int i = threadIdx.x; i < kTile * kTile / kPerCopy; i += blockDim.x) {
    const int row = i / (kTile / kPerCopy), column = i % (kTile / kPerCopy) * kPerCopy;
    device::copy_async<16>(shared + row * kStride<T> + column + kShift,
                           global + std::int64_t{row} * stride + column, 16);
  }
  device::copy_async_commit();
}

// acc += the warp's 16 rows of a (64 x 64) times b, 16-bit formats.
template <typename T, bool kTransposed, Fault kFault>
__device__ __forceinline__ void multiply_tile(float (&acc)[8][4], const T* a, const T* b) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int k = 0; k < kTile; k += 16) {
    std::uint32_t fragment[4];
    const T* row = a + (warp * 16 + lane % 16) * kStride<T> + k + lane / 16 * 8;
    device::load_matrices(fragment, kFault == Fault::kMisalignedRow ? row + 1 : row);
    for (int n = 0; n < 8; n += 2) {
      std::uint32_t r[4];  // b0, b1 of columns 8n.. and of the eight after them
      if constexpr (kTransposed) {
        device::load_matrices_transposed(r,
                                         b + (k + lane % 16) * kStride<T> + n * 8 + lane / 16 * 8);
      } else {
        device::load_matrices(
            r, b + (n * 8 + lane % 8 + lane / 16 * 8) * kStride<T> + k + lane / 8 % 2 * 8);
      }
      if constexpr (kFault == Fault::kOneLaneTooFew) {
        if (threadIdx.x == 37) __syncwarp();
      }
      constexpr int kFirst = kFault == Fault::kSwappedB ? 1 : 0;
      device::multiply_add<T>(acc[n], fragment, r[kFirst], r[1 - kFirst]);
      device::multiply_add<T>(acc[n + 1], fragment, r[2 + kFirst], r[3 - kFirst]);
    }
  }
}

// The same for float, rounded to tf32. To ldmatrix a float is two 16-bit values, so a lane gets
// the floats (lane / 4, lane % 4) of 8 x 4; there is nothing that transposes these.
template <bool kTransposed>
__device__ __forceinline__ void multiply_tile_tf32(float (&acc)[8][4], const float* a,
                                                   const float* b) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto round_all = [](std::uint32_t (&r)[4]) {
    for (int i = 0; i < 4; ++i) r[i] = device::to_tf32(__uint_as_float(r[i]));
  };
  for (int k = 0; k < kTile; k += 8) {
    std::uint32_t fragment[4];
    device::load_matrices(fragment,
                          a + (warp * 16 + lane % 16) * kStride<float> + k + lane / 16 * 4);
    round_all(fragment);
    for (int n = 0; n < 8; n += 2) {
      std::uint32_t r[4];
      if constexpr (kTransposed) {
        for (int i = 0; i < 4; ++i) {
          const int row = k + lane % 4 + i % 2 * 4, column = (n + i / 2) * 8 + lane / 4;
          r[i] = __float_as_uint(b[row * kStride<float> + column]);
        }
      } else {
        device::load_matrices(
            r, b + (n * 8 + lane % 8 + lane / 16 * 8) * kStride<float> + k + lane / 8 % 2 * 4);
      }
      round_all(r);
      device::multiply_add_tf32(acc[n], fragment, r[0], r[1]);
      device::multiply_add_tf32(acc[n + 1], fragment, r[2], r[3]);
    }
  }
}

template <typename T, bool kTransposed, Fault kFault = Fault::kNone>
__global__ void __launch_bounds__(128)
    multiply(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ c, int num_rows,
             int num_columns, int depth) {
  T* shared = reinterpret_cast<T*>(device::dynamic_shared());
  const auto tile = [&](int stage, int which) {
    return shared + (stage * 2 + which) * kTile * kStride<T>;
  };
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  const auto begin_chunk = [&](int chunk) {
    const int k = chunk * kTile;
    begin_tile<T, kFault>(tile(chunk % 2, 0), a + std::int64_t{row0} * depth + k, depth);
    if constexpr (kTransposed) {
      begin_tile<T, kFault>(tile(chunk % 2, 1), b + std::int64_t{k} * num_columns + column0,
                            num_columns);
    } else {
      begin_tile<T, kFault>(tile(chunk % 2, 1), b + std::int64_t{column0} * depth + k, depth);
    }
  };

  float acc[8][4] = {};
  const int num_chunks = depth / kTile;
  begin_chunk(0);
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    if (chunk + 1 < num_chunks) {
      begin_chunk(chunk + 1);
      device::copy_async_wait<2>();
    } else if constexpr (kFault != Fault::kNoWait) {
      device::copy_async_wait<0>();
    }
    if constexpr (kFault != Fault::kNoBarrierBeforeRead) __syncthreads();
    if constexpr (sizeof(T) == 4) {
      multiply_tile_tf32<kTransposed>(acc, tile(chunk % 2, 0), tile(chunk % 2, 1));
    } else {
      multiply_tile<T, kTransposed, kFault>(acc, tile(chunk % 2, 0), tile(chunk % 2, 1));
    }
    if constexpr (kFault != Fault::kNoBarrierBeforeOverwrite) __syncthreads();
  }
  if constexpr (kFault == Fault::kNoWait) device::copy_async_wait<0>();

  const int row = row0 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  for (int n = 0; n < 8; ++n) {
    for (int half = 0; half < 2; ++half) {
      float* out =
          c + std::int64_t{row + half * 8} * num_columns + column0 + n * 8 + threadIdx.x % 4 * 2;
      *reinterpret_cast<float2*>(out) = make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
    }
  }
}

}  // namespace cases
