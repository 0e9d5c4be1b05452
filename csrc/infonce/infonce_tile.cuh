// What the forward and the backward kernel of infonce share: tiles in shared memory, the products
// of tiles on tensor cores, and the sides that say which logits count.
//
// A block of four warps owns kOwnRows rows X of one side and walks over tiles of kOtherRows rows Y
// of the other. Warp w owns rows 16 kM w .. 16 kM (w + 1) - 1; its lane (g = lane / 4, t = lane %
// 4) holds of Z = X Yᵀ the elements z[m][n][2 h + e]: row 16 m + g + 8 h of the warp, column 8 n +
// 2 t + e of the tile (layouts: ptx.cuh).
//
// A row in shared memory is padded by 16 bytes: eight rows at one column lie in different banks.

#pragma once

#include <type_traits>

#include "device/ptx.cuh"
#include "infonce/infonce_device.h"

namespace torchrec_pt::device {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;

// --- numbers ------------------------------------------------------------------------------------

struct Bfloat16 {
  using Stored = __nv_bfloat16;
};
struct Float16 {
  using Stored = __half;
};
struct Tf32 {
  using Stored = float;
};
struct Tf32x3 {
  using Stored = float;
};

// Operand registers; `low` is what tf32 leaves of a float32, for Tf32x3 alone.
template <int kRegisters>
struct Operand {
  std::uint32_t high[kRegisters];
  std::uint32_t low[kRegisters];
};

template <typename Number, int kRegisters>
__device__ __forceinline__ Operand<kRegisters> to_operand(const std::uint32_t (&raw)[kRegisters]) {
  Operand<kRegisters> operand;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if constexpr (std::is_same_v<typename Number::Stored, float>) {
      const float value = __uint_as_float(raw[i]);
      operand.high[i] = to_tf32(value);
      if constexpr (std::is_same_v<Number, Tf32x3>) {
        operand.low[i] = to_tf32(value - __uint_as_float(operand.high[i]));
      }
    } else {
      operand.high[i] = raw[i];
    }
  }
  return operand;
}

// d += a b over 32 bytes of contraction: 16 values of 16 bits or 8 of 32. `kIsTransposed` is for
// a product whose sides have changed places: its terms are added in the same order.
template <typename Number, bool kIsTransposed = false>
__device__ __forceinline__ void multiply(float (&d)[4], const Operand<4>& a, const Operand<2>& b) {
  if constexpr (std::is_same_v<Number, Tf32x3>) {
    if constexpr (kIsTransposed) multiply_add_tf32(d, a.high, b.low[0], b.low[1]);
    multiply_add_tf32(d, a.low, b.high[0], b.high[1]);
    if constexpr (!kIsTransposed) multiply_add_tf32(d, a.high, b.low[0], b.low[1]);
  }
  if constexpr (std::is_same_v<typename Number::Stored, float>) {
    multiply_add_tf32(d, a.high, b.high[0], b.high[1]);
  } else {
    multiply_add<typename Number::Stored>(d, a.high, b.high[0], b.high[1]);
  }
}

// --- tiles --------------------------------------------------------------------------------------

template <typename Number_, int kDim_, int kM_, int kN_>
struct Tile {
  using Number = Number_;
  using Stored = typename Number::Stored;
  using Logits = float[kM_][kN_][4];

  static constexpr int kDim = kDim_;  // D, rounded up
  static constexpr int kM = kM_;      // 16-row tiles of a warp
  static constexpr int kN = kN_;      // 8-row tiles of the other side; even
  static constexpr int kOwnRows = 16 * kM * kWarps;
  static constexpr int kOtherRows = 8 * kN;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Stored)) + 16;
  static constexpr int kOwnBytes = kOwnRows * kRowBytes;
  static constexpr int kOtherBytes = kOtherRows * kRowBytes;
};

// Begins to copy rows first.. of `vectors` (num, stride) to a tile of kRows; rows and columns that
// do not exist or are not live become 0.
template <typename Tile, int kRows>
__device__ __forceinline__ void load_tile(unsigned char* tile, const void* vectors,
                                          std::int64_t stride, int dim, int first, int num,
                                          const bool* is_live) {
  using Stored = typename Tile::Stored;
  constexpr int kChunk = 16 / sizeof(Stored);
  constexpr int kChunks = Tile::kDim / kChunk;
  const auto* source = static_cast<const Stored*>(vectors);
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int column = i % kChunks * kChunk;
    const bool exists = first + row < num && column < dim && (!is_live || is_live[first + row]);
    const int num_valid = exists ? min(kChunk, dim - column) : 0;
    copy_async<16>(tile + row * Tile::kRowBytes + column * sizeof(Stored),
                   source + (exists ? (first + row) * stride + column : 0),
                   num_valid * static_cast<int>(sizeof(Stored)));
  }
}

// Z = X Yᵀ of one warp; x is its first row, y the whole tile. Own rows that are keys give the bits
// of own rows that are queries.
template <typename Tile, bool kOwnIsQuery = true>
__device__ __forceinline__ void multiply_rows(typename Tile::Logits& z, const unsigned char* x,
                                              const unsigned char* y) {
  const int lane = threadIdx.x % 32;
  x += lane % 16 * Tile::kRowBytes + lane / 16 * 16;
  y += (lane % 8 + lane / 16 * 8) * Tile::kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) z[m][n][i] = 0;
    }
  }
  constexpr int kSteps = (Tile::kRowBytes - 16) / 32;
#pragma unroll 2
  for (int k = 0; k < kSteps; ++k) {
    Operand<4> a[Tile::kM];
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) {
      std::uint32_t raw[4];
      load_matrices(raw, x + m * 16 * Tile::kRowBytes + k * 32);
      a[m] = to_operand<typename Tile::Number>(raw);
    }
#pragma unroll
    for (int n = 0; n < Tile::kN; n += 2) {
      std::uint32_t raw[4];
      load_matrices(raw, y + n * 8 * Tile::kRowBytes + k * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t pair[2] = {raw[2 * half], raw[2 * half + 1]};
        const Operand<2> b = to_operand<typename Tile::Number>(pair);
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m) {
          multiply<typename Tile::Number, !kOwnIsQuery>(z[m][n + half], a[m], b);
        }
      }
    }
  }
}

// Calls visit(m, n, i, own_row, other_row) for each logit that this lane holds; the rows count
// within the tile.
template <typename Tile, typename Visit>
__device__ __forceinline__ void for_each_logit(const Visit& visit) {
  const int lane = threadIdx.x % 32;
  const int first_own = threadIdx.x / 32 * 16 * Tile::kM + lane / 4;
  const int first_other = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          visit(m, n, 2 * h + e, first_own + 16 * m + 8 * h, first_other + 8 * n + e);
        }
      }
    }
  }
}

// --- sides --------------------------------------------------------------------------------------

// What is known of each query and each key besides its vector. A thread fetches one entry while the
// products before it run, and puts it into the shared side afterwards. Logits and logsumexps are in
// log2 units, gradients are times `scale`.

struct QueryEntry {
  std::int64_t target_id;
  std::int64_t query_id;
  int target;      // -1: none
  int self_index;  // -1: none
  float positive_shift;
  float lse;  // +inf: the query takes part in nothing
  float grad;
  float grad_target;
};

struct KeyEntry {
  std::int64_t key_id;
  std::int64_t key_query_id;
  float shift;  // -inf: no such key
  float column_lse;
  float column_grad;
};

// No key has the index -1, and none is past 2^31.
__device__ __forceinline__ int to_key_index(std::int64_t index) {
  return index < 0 || index > INT32_MAX ? -1 : static_cast<int>(index);
}

__device__ __forceinline__ QueryEntry fetch(const InfonceQueries& from, int i, float scale) {
  if (i >= from.num || (from.is_live && !from.is_live[i])) return {0, 0, -1, -1, 0, INFINITY, 0, 0};
  return {from.target_id ? from.target_id[i] : 0,
          from.query_id ? from.query_id[i] : 0,
          from.target ? static_cast<int>(from.target[i]) : -1,
          from.self_index ? to_key_index(from.self_index[i]) : -1,
          from.positive_shift ? from.positive_shift[i] * kLog2E : 0,
          from.lse ? from.lse[i] * kLog2E : 0,
          from.grad ? from.grad[i] * scale : 0,
          from.grad_target ? from.grad_target[i] * scale : 0};
}

__device__ __forceinline__ KeyEntry fetch(const InfonceKeys& from, int j, float scale) {
  if (j >= from.num) return {0, 0, -INFINITY, INFINITY, 0};
  const bool is_column = from.column_lse && j < from.num_columns;
  return {from.key_id ? from.key_id[j] : 0, from.key_query_id ? from.key_query_id[j] : 0,
          from.shift ? from.shift[j] * kLog2E : 0,
          is_column ? from.column_lse[j] * kLog2E : INFINITY,
          is_column ? from.column_grad[j] * scale : 0};
}

template <int kSize>
struct QuerySide {
  std::int64_t target_id[kSize];
  std::int64_t query_id[kSize];
  int target[kSize];
  int self_index[kSize];
  float positive_shift[kSize];
  float lse[kSize];
  float grad[kSize];
  float grad_target[kSize];

  __device__ __forceinline__ void put(int r, const QueryEntry& entry) {
    static_assert(kSize <= kThreads);
    if (r >= kSize) return;
    target_id[r] = entry.target_id;
    query_id[r] = entry.query_id;
    target[r] = entry.target;
    self_index[r] = entry.self_index;
    positive_shift[r] = entry.positive_shift;
    lse[r] = entry.lse;
    grad[r] = entry.grad;
    grad_target[r] = entry.grad_target;
  }
};

template <int kSize>
struct KeySide {
  std::int64_t key_id[kSize];
  std::int64_t key_query_id[kSize];
  float shift[kSize];
  float column_lse[kSize];
  float column_grad[kSize];

  __device__ __forceinline__ void put(int r, const KeyEntry& entry) {
    static_assert(kSize <= kThreads);
    if (r >= kSize) return;
    key_id[r] = entry.key_id;
    key_query_id[r] = entry.key_query_id;
    shift[r] = entry.shift;
    column_lse[r] = entry.column_lse;
    column_grad[r] = entry.column_grad;
  }
};

__device__ __forceinline__ float scale_of(float temperature) { return kLog2E / temperature; }

// s_ij in log2 units, `scale` being scale_of(tau). An explicit fma, so that it is rounded alike
// wherever it is computed: a row with nothing but its target has the loss 0, not nearly 0.
__device__ __forceinline__ float logit(float dot, float scale, float shift) {
  return fmaf(dot, scale, shift);
}

__device__ __forceinline__ bool has_masks(const InfonceOnDevice& problem) {
  return problem.queries.target_id || problem.queries.query_id || problem.queries.self_index;
}

// Sets z to -inf where query i may not see key j (numbered within their sides; key j of the tile is
// key first_key + j). The target is always seen.
template <typename Queries, typename Keys>
__device__ __forceinline__ void mask(float& z, const InfonceOnDevice& problem,
                                     const Queries& queries, int i, const Keys& keys, int j,
                                     int first_key) {
  const bool is_same_item = problem.queries.target_id && keys.key_id[j] == queries.target_id[i];
  const bool is_same_user = problem.queries.query_id && keys.key_query_id[j] == queries.query_id[i];
  const bool is_itself = queries.self_index[i] == first_key + j;
  const bool is_target = queries.target[i] == first_key + j;
  if ((is_same_item || is_same_user || is_itself) && !is_target) z = -INFINITY;
}

// --- launches -----------------------------------------------------------------------------------

// Of the small kernels that put parts together.
constexpr int kMergeThreads = 256;

// Two blocks fit on a multiprocessor of compute capability 8.0: 164 KiB, 1 of it for each block.
constexpr std::size_t kSharedBytesOfTwo = 164 * 1024 / 2 - 1024;

template <typename Tile>
constexpr bool must_fit_twice = sizeof(typename Tile::Stored) == 2 && Tile::kDim <= 128;

// Calls launcher.operator()<Number, kDim>() for the smallest kDim that holds dim.
template <typename Number, typename Launcher>
int dispatch_dim(int dim, Launcher& launcher) {
  if (dim <= 32) return launcher.template operator()<Number, 32>();
  if (dim <= 64) return launcher.template operator()<Number, 64>();
  if (dim <= 128) return launcher.template operator()<Number, 128>();
  return launcher.template operator()<Number, kMostDims>();
}

template <typename Launcher>
int dispatch(Numbers numbers, int dim, Launcher& launcher) {
  switch (numbers) {
    case Numbers::kBfloat16:
      return dispatch_dim<Bfloat16>(dim, launcher);
    case Numbers::kFloat16:
      return dispatch_dim<Float16>(dim, launcher);
    case Numbers::kTf32:
      return dispatch_dim<Tf32>(dim, launcher);
    default:
      return dispatch_dim<Tf32x3>(dim, launcher);
  }
}

// The number of splits whose blocks, run in waves of num_blocks, walk over the fewest tiles one
// after the other. No split is without a tile.
inline InfonceGrid grid_of(int num_own, int own_rows, int num_other, int other_rows, int num_blocks,
                           int most_tiles = INT32_MAX) {
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t num_tiles = ceil_div(num_own, own_rows);
  const std::int64_t num_other_tiles = ceil_div(num_other, other_rows);
  const std::int64_t num_at_once = num_tiles < most_tiles ? num_tiles : most_tiles;
  std::int64_t num_splits = 1;
  std::int64_t fewest = INT64_MAX;
  for (std::int64_t splits = 1; splits <= ceil_div(num_blocks, num_at_once); ++splits) {
    const std::int64_t num_waves = ceil_div(num_at_once * splits, num_blocks);
    const std::int64_t num_walked = num_waves * ceil_div(num_other_tiles, splits);
    if (num_walked >= fewest) continue;
    fewest = num_walked;
    num_splits = splits;
  }
  const std::int64_t tiles_per_split = ceil_div(num_other_tiles, num_splits);
  num_splits = ceil_div(num_other_tiles, tiles_per_split);
  return {static_cast<int>(num_tiles), static_cast<int>(num_splits),
          static_cast<int>(tiles_per_split), static_cast<int>(num_at_once)};
}

}  // namespace torchrec_pt::device
