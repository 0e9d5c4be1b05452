// Forward of infonce on CUDA: of each query the softmax sums over the keys and, for the symmetric
// loss, of each key those over the queries (formula and shapes: infonce.h).
//
// A block owns 64 or 128 queries in shared memory and streams its split of the keys through two
// buffers. Each lane keeps the running maximum and sums of its own columns of a row, so that no
// lane waits for another until the end. Column sums are merged over the block's warps and left as
// one part for each tile of queries. A second, small kernel merges the parts.
//
// Reads B D + ceil(B / own rows) N D values from memory or L2, does 2 B N D operations and B N
// exponentials (2 B N for the symmetric loss), writes O(B + N).

#include <algorithm>

#include "infonce/infonce_tile.cuh"

namespace torchrec_pt::device {
namespace {

// 16 bits: 128 queries against 64 keys; two blocks an SM up to D = 128.
template <typename Number, int kDim>
struct ForwardTileOf {
  static constexpr bool kIs16Bit = sizeof(typename Number::Stored) == 2;
  using type = Tile<Number, kDim, kIs16Bit && kDim <= 128 ? 2 : 1, kIs16Bit || kDim <= 64 ? 8 : 4>;
};
template <typename Number, int kDim>
using ForwardTile = typename ForwardTileOf<Number, kDim>::type;

__device__ __forceinline__ SoftmaxSums no_sums() { return {-INFINITY, 0, 0}; }

// 2^(highest - of a larger one), and 0 where there is nothing yet.
__device__ __forceinline__ float rescale(float highest, float larger) {
  return highest == -INFINITY ? 0 : exp2_approx(highest - larger);
}

__device__ __forceinline__ SoftmaxSums merged(const SoftmaxSums& a, const SoftmaxSums& b) {
  const float highest = fmaxf(a.highest, b.highest);
  const float scale_a = rescale(a.highest, highest);
  const float scale_b = rescale(b.highest, highest);
  return {highest, a.sum * scale_a + b.sum * scale_b, a.dot * scale_a + b.dot * scale_b};
}

__device__ __forceinline__ SoftmaxSums merged_with_lane(const SoftmaxSums& mine, int lane_mask) {
  return merged(mine, {__shfl_xor_sync(0xffffffff, mine.highest, lane_mask),
                       __shfl_xor_sync(0xffffffff, mine.sum, lane_mask),
                       __shfl_xor_sync(0xffffffff, mine.dot, lane_mask)});
}

template <typename Tile>
struct ForwardShared {
  QuerySide<Tile::kOwnRows> queries;
  KeySide<Tile::kOtherRows> keys[2];
  SoftmaxSums columns[kWarps][Tile::kOtherRows];
};

template <typename Tile>
constexpr std::size_t forward_shared_bytes() {
  return Tile::kOwnBytes + 2 * Tile::kOtherBytes + sizeof(ForwardShared<Tile>);
}

// Adds one tile of logits to the running sums of each row of this lane.
template <typename Tile>
__device__ __forceinline__ void add_rows(SoftmaxSums (&rows)[Tile::kM][2],
                                         const typename Tile::Logits& z,
                                         const QuerySide<Tile::kOwnRows>& queries,
                                         const KeySide<Tile::kOtherRows>& keys, int first_key,
                                         float scale, int first_query, float* positive_dot) {
  const auto row_logit = [&](int m, int n, int i, int row, int column) {
    const bool is_target = queries.target[row] == first_key + column;
    return logit(z[m][n][i], scale, is_target ? queries.positive_shift[row] : keys.shift[column]);
  };
  float highest[Tile::kM][2];
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) highest[m][h] = rows[m][h].highest;
  }
  for_each_logit<Tile>([&](int m, int n, int i, int row, int column) {
    highest[m][i / 2] = fmaxf(highest[m][i / 2], row_logit(m, n, i, row, column));
  });
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = rescale(rows[m][h].highest, highest[m][h]);
      rows[m][h] = {highest[m][h], rows[m][h].sum * factor, rows[m][h].dot * factor};
      if (highest[m][h] == -INFINITY) highest[m][h] = 0;  // exp2(-inf - 0) is 0
    }
  }
  for_each_logit<Tile>([&](int m, int n, int i, int row, int column) {
    const float e = exp2_approx(row_logit(m, n, i, row, column) - highest[m][i / 2]);
    rows[m][i / 2].sum += e;
    if (e != 0) rows[m][i / 2].dot += e * z[m][n][i];  // 0 * -inf would be NaN
    if (queries.target[row] == first_key + column) positive_dot[first_query + row] = z[m][n][i];
  });
}

// The sums of the tile's columns over this warp's rows, to shared memory.
template <typename Tile>
__device__ __forceinline__ void sum_columns(SoftmaxSums* columns, const typename Tile::Logits& z,
                                            const QuerySide<Tile::kOwnRows>& queries, float scale) {
  const int lane = threadIdx.x % 32;
  const int first_row = threadIdx.x / 32 * 16 * Tile::kM + lane / 4;
#pragma unroll
  for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      SoftmaxSums column = no_sums();
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float c = logit(z[m][n][2 * h + e], scale, 0);
          if (queries.lse[first_row + 16 * m + 8 * h] != INFINITY) {
            column.highest = fmaxf(column.highest, c);
          }
        }
      }
#pragma unroll
      for (int other = 4; other < 32; other *= 2) {
        column.highest = fmaxf(column.highest, __shfl_xor_sync(0xffffffff, column.highest, other));
      }
      const float highest = column.highest == -INFINITY ? 0 : column.highest;
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float product = z[m][n][2 * h + e];
          const float power = exp2_approx(logit(product, scale, 0) - highest);
          if (queries.lse[first_row + 16 * m + 8 * h] != INFINITY && power != 0) {
            column.sum += power;
            column.dot += power * product;
          }
        }
      }
#pragma unroll
      for (int other = 4; other < 32; other *= 2) {
        column.sum += __shfl_xor_sync(0xffffffff, column.sum, other);
        column.dot += __shfl_xor_sync(0xffffffff, column.dot, other);
      }
      if (lane < 4) columns[8 * n + 2 * lane + e] = column;
    }
  }
}

template <typename Tile, bool kSymmetric>
__global__ void __launch_bounds__(kThreads, 2)
    infonce_forward(InfonceOnDevice problem, int first_tile, int tiles_per_split,
                    InfonceForwardResults results) {
  unsigned char* x = dynamic_shared();
  unsigned char* y = x + Tile::kOwnBytes;
  auto& shared = *reinterpret_cast<ForwardShared<Tile>*>(y + 2 * Tile::kOtherBytes);
  const InfonceQueries& queries = problem.queries;
  const InfonceKeys& keys = problem.keys;
  const float scale = scale_of(*problem.temperature);
  const bool is_masked = has_masks(problem);

  const int first_query = (first_tile + blockIdx.x) * Tile::kOwnRows;
  const int begin = blockIdx.y * tiles_per_split * Tile::kOtherRows;
  const int end = min(keys.num, begin + tiles_per_split * Tile::kOtherRows);
  const auto load_keys = [&](int first_key, int buffer) {
    load_tile<Tile, Tile::kOtherRows>(y + buffer * Tile::kOtherBytes, keys.vectors, keys.stride,
                                      problem.dim, first_key, end, nullptr);
  };
  const int thread = threadIdx.x;
  load_tile<Tile, Tile::kOwnRows>(x, queries.vectors, queries.stride, problem.dim, first_query,
                                  queries.num, queries.is_live);
  load_keys(begin, 0);
  copy_async_commit();
  shared.queries.put(thread, fetch(queries, first_query + thread, 0));
  shared.keys[0].put(thread, fetch(keys, begin + thread, 0));

  SoftmaxSums rows[Tile::kM][2];
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) rows[m][0] = rows[m][1] = no_sums();
  const int warp = thread / 32;
  int buffer = 0;
  for (int first_key = begin; first_key < end; first_key += Tile::kOtherRows, buffer ^= 1) {
    const int next_key = first_key + Tile::kOtherRows;
    if (next_key < end) load_keys(next_key, buffer ^ 1);
    const KeyEntry next = fetch(keys, next_key + thread, 0);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    typename Tile::Logits z;
    multiply_rows<Tile>(z, x + warp * 16 * Tile::kM * Tile::kRowBytes,
                        y + buffer * Tile::kOtherBytes);
    if (is_masked) {
      for_each_logit<Tile>([&](int m, int n, int i, int row, int column) {
        mask(z[m][n][i], problem, shared.queries, row, shared.keys[buffer], column, first_key);
      });
    }
    add_rows<Tile>(rows, z, shared.queries, shared.keys[buffer], first_key, scale, first_query,
                   results.positive_dot);
    if constexpr (kSymmetric) sum_columns<Tile>(shared.columns[warp], z, shared.queries, scale);
    shared.keys[buffer ^ 1].put(thread, next);
    __syncthreads();
    if constexpr (kSymmetric) {
      const int column = first_key + thread;
      if (thread < Tile::kOtherRows && column < keys.num_columns) {
        SoftmaxSums total = shared.columns[0][thread];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) total = merged(total, shared.columns[w][thread]);
        results.column_parts[std::int64_t{blockIdx.x} * keys.num_columns + column] = total;
      }
    }
  }

  const int lane = thread % 32;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const SoftmaxSums total = merged_with_lane(merged_with_lane(rows[m][h], 1), 2);
      const int row = first_query + (warp * Tile::kM + m) * 16 + 8 * h + lane / 4;
      if (lane % 4 == 0 && row < queries.num) {
        results.row_parts[std::int64_t{blockIdx.y} * queries.num + row] = total;
      }
    }
  }
}

// --- the parts together -------------------------------------------------------------------------

dim3 one_thread_each(int size) { return dim3((size + kMergeThreads - 1) / kMergeThreads); }

// totals_i = parts_0i + parts_1i + ..., on top of what is there already.
__global__ void infonce_merge(const SoftmaxSums* parts, int num_parts, int size, bool is_first,
                              SoftmaxSums* totals) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  SoftmaxSums total = is_first ? no_sums() : totals[i];
  for (int part = 0; part < num_parts; ++part) {
    total = merged(total, parts[std::int64_t{part} * size + i]);
  }
  totals[i] = total;
}

// In log2 units.
__device__ __forceinline__ float logsumexp(const SoftmaxSums& sums) {
  return sums.sum == 0 ? -INFINITY : sums.highest + log2f(sums.sum);
}

__device__ __forceinline__ float expected_dot(const SoftmaxSums& sums) {
  return sums.sum == 0 ? 0 : sums.dot / sums.sum;
}

__device__ __forceinline__ float positive_logit(const InfonceOnDevice& problem, int i, float dot) {
  const float* shift = problem.queries.positive_shift;
  return logit(dot, scale_of(*problem.temperature), shift ? shift[i] * kLog2E : 0);
}

__global__ void infonce_rows(InfonceOnDevice problem, const SoftmaxSums* rows,
                             const float* positive_dot, InfonceRowOutputs outputs) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= problem.queries.num) return;
  const std::int64_t* target = problem.queries.target;
  TORCHREC_PT_DEVICE_ASSERT(!target || (target[i] >= 0 && target[i] < problem.keys.num));
  outputs.lse[i] = logsumexp(rows[i]) * kLn2;
  outputs.expected_dot[i] = expected_dot(rows[i]);
  outputs.positive[i] = target ? positive_logit(problem, i, positive_dot[i]) * kLn2 : 0;
}

__global__ void infonce_pairs(InfonceOnDevice problem, const SoftmaxSums* rows,
                              const SoftmaxSums* columns, const float* positive_dot,
                              InfoncePairOutputs outputs) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= problem.queries.num) return;
  if (problem.queries.is_live && !problem.queries.is_live[i]) {
    outputs.loss[i] = outputs.slope[i] = 0;
    outputs.lse[i] = outputs.column_lse[i] = INFINITY;  // no exp(s - lse) of it is more than 0
    return;
  }
  const float temperature = *problem.temperature;
  const float dot = positive_dot[i];
  const float row_lse = logsumexp(rows[i]);
  const float column_lse = logsumexp(columns[i]);
  // Subtracted before they are scaled: a compiler may fuse a scale with a difference, and then
  // equal terms leave a rounding error.
  const float row_loss = row_lse - positive_logit(problem, i, dot);
  const float column_loss = column_lse - logit(dot, scale_of(temperature), 0);
  // s = q . k / tau + ..., so ds / dtau = -q . k / tau^2.
  const float excess = expected_dot(rows[i]) + expected_dot(columns[i]) - 2 * dot;
  outputs.loss[i] = (row_loss + column_loss) * (kLn2 / 2);
  outputs.lse[i] = row_lse * kLn2;
  outputs.column_lse[i] = column_lse * kLn2;
  outputs.slope[i] = -excess / (2 * temperature * temperature);
}

// --- launches -----------------------------------------------------------------------------------

template <typename Tile, bool kSymmetric>
cudaError_t launch_tiles(const InfonceOnDevice& problem, InfonceGrid grid,
                         const InfonceForwardResults& results, cudaStream_t stream) {
  static_assert(!must_fit_twice<Tile> || forward_shared_bytes<Tile>() <= kSharedBytesOfTwo);
  for (int first_tile = 0; first_tile < grid.num_tiles; first_tile += grid.num_at_once) {
    const int num_tiles = std::min(grid.num_at_once, grid.num_tiles - first_tile);
    cudaError_t error = launch(infonce_forward<Tile, kSymmetric>, dim3(num_tiles, grid.num_splits),
                               dim3(kThreads), forward_shared_bytes<Tile>(), stream, problem,
                               first_tile, grid.tiles_per_split, results);
    if (kSymmetric && error == cudaSuccess) {
      const int num_columns = problem.keys.num_columns;
      error =
          launch(infonce_merge, one_thread_each(num_columns), dim3(kMergeThreads), 0, stream,
                 results.column_parts, num_tiles, num_columns, first_tile == 0, results.columns);
    }
    if (error != cudaSuccess) return error;
  }
  return launch(infonce_merge, one_thread_each(problem.queries.num), dim3(kMergeThreads), 0, stream,
                results.row_parts, grid.num_splits, problem.queries.num, true, results.rows);
}

struct ForwardGrid {
  int num_rows;
  int num_keys;
  int most_tiles;
  int num_blocks;
  InfonceGrid grid;

  template <typename Number, int kDim>
  int operator()() {
    using Tile = ForwardTile<Number, kDim>;
    grid = grid_of(num_rows, Tile::kOwnRows, num_keys, Tile::kOtherRows, num_blocks, most_tiles);
    return 0;
  }
};

struct LaunchForward {
  const InfonceOnDevice& problem;
  InfonceGrid grid;
  const InfonceForwardResults& results;
  cudaStream_t stream;

  template <typename Number, int kDim>
  int operator()() {
    using Tile = ForwardTile<Number, kDim>;
    return results.column_parts ? launch_tiles<Tile, true>(problem, grid, results, stream)
                                : launch_tiles<Tile, false>(problem, grid, results, stream);
  }
};

}  // namespace

InfonceGrid infonce_forward_grid(Numbers numbers, int dim, int num_rows, int num_keys,
                                 int most_tiles, int num_blocks) {
  ForwardGrid chosen{num_rows, num_keys, most_tiles, num_blocks, {}};
  dispatch(numbers, dim, chosen);
  return chosen.grid;
}

int launch_infonce_forward(Numbers numbers, const InfonceOnDevice& problem, InfonceGrid grid,
                           const InfonceForwardResults& results, CUstream_st* stream) {
  LaunchForward forward{problem, grid, results, stream};
  return dispatch(numbers, problem.dim, forward);
}

int launch_infonce_rows(const InfonceOnDevice& problem, const SoftmaxSums* rows,
                        const float* positive_dot, const InfonceRowOutputs& outputs,
                        CUstream_st* stream) {
  return launch(infonce_rows, one_thread_each(problem.queries.num), dim3(kMergeThreads), 0, stream,
                problem, rows, positive_dot, outputs);
}

int launch_infonce_pairs(const InfonceOnDevice& problem, const SoftmaxSums* rows,
                         const SoftmaxSums* columns, const float* positive_dot,
                         const InfoncePairOutputs& outputs, CUstream_st* stream) {
  return launch(infonce_pairs, one_thread_each(problem.queries.num), dim3(kMergeThreads), 0, stream,
                problem, rows, columns, positive_dot, outputs);
}

}  // namespace torchrec_pt::device
