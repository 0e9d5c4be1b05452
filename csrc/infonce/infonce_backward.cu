// Backward of infonce on CUDA: the gradient of one side (formula and shapes: infonce.h).
//
//   ds_ij = grad_i p_ij + grad_target_i [j = t_i] + column_grad_j exp(c_ij - column_lse_j)
//   dq_i  = sum_j ds_ij k_j / tau,  dk_j = sum_i ds_ij q_i / tau
//
// One kernel: a block owns rows X of one side, queries or keys, and streams its split of the other
// side Y. It makes the logits of a tile again, turns them into ds in the accumulator registers and
// uses those as the left operand of dX += ds Y: for 16 bits the layouts agree, for tf32 they do
// after the contraction index is renamed (2 t, 2 t + 1 for t, t + 4). No atomics: the same bits
// each time. Calling it for both sides makes five products with forward's, of 2 B N D operations
// each.
//
// Reads M D + ceil(M / own rows) L D values (M own rows, L others), does 4 B N D operations and B N
// exponentials (2 B N for the symmetric loss), writes M D.

#include "infonce/infonce_tile.cuh"

namespace torchrec_pt::device {
namespace {

// dX takes 4 kM kDim / 8 registers a lane and Z 4 kM kN: as large as goes without spilling.
template <typename Number, int kDim>
struct BackwardTileOf {
  static constexpr bool kIs16Bit = sizeof(typename Number::Stored) == 2;
  static constexpr int kM = kIs16Bit && kDim <= 128 ? 2 : 1;
  static constexpr int kN = kIs16Bit || kDim > 64 ? 4 : 8;
  using type = Tile<Number, kDim, kM, kN>;
};
template <typename Number, int kDim>
using BackwardTile = typename BackwardTileOf<Number, kDim>::type;

template <typename Tile, bool kOwnIsQuery>
struct BackwardShared {
  std::conditional_t<kOwnIsQuery, QuerySide<Tile::kOwnRows>, KeySide<Tile::kOwnRows>> own;
  std::conditional_t<kOwnIsQuery, KeySide<Tile::kOtherRows>, QuerySide<Tile::kOtherRows>> other[2];
};

template <typename Tile, bool kOwnIsQuery>
constexpr std::size_t backward_shared_bytes() {
  return Tile::kOwnBytes + 2 * Tile::kOtherBytes + sizeof(BackwardShared<Tile, kOwnIsQuery>);
}

// What of ds does not change from tile to tile.
struct Softmax {
  float scale;  // scale_of(tau)
  bool is_masked;
  bool is_symmetric;
};

// A logit by the way that its logsumexp came, through natural units: where the target is all that
// a row has, they are equal and p is 1 exactly.
__device__ __forceinline__ float as_stored(float logit) {
  return __fmul_rn(__fmul_rn(logit, kLn2), kLog2E);  // never fused with what follows
}

// z becomes ds. Of keys, bias collects of each own row what comes from the rows' direction.
template <typename Tile, bool kOwnIsQuery, typename Own, typename Other>
__device__ __forceinline__ void to_ds(typename Tile::Logits& z, float (&bias)[Tile::kM][2],
                                      const InfonceOnDevice& problem, const Softmax& softmax,
                                      const Own& own, int first_own, const Other& other,
                                      int first_other) {
  const int first_key = kOwnIsQuery ? first_other : first_own;
  const auto sides = [&](auto&& visit) {
    for_each_logit<Tile>([&](int m, int n, int i, int own_row, int other_row) {
      if constexpr (kOwnIsQuery) {
        visit(z[m][n][i], bias[m][i / 2], own, own_row, other, other_row);
      } else {
        visit(z[m][n][i], bias[m][i / 2], other, other_row, own, own_row);
      }
    });
  };
  if (softmax.is_masked) {
    sides([&](float& dot, float&, const auto& queries, int i, const auto& keys, int j) {
      mask(dot, problem, queries, i, keys, j, first_key);
    });
  }
  // grad_i p_ij
  const auto of_row = [&](float dot, const auto& queries, int i, const auto& keys, int j,
                          bool is_target) {
    const float s =
        logit(dot, softmax.scale, is_target ? queries.positive_shift[i] : keys.shift[j]);
    return queries.grad[i] * exp2_approx((is_target ? as_stored(s) : s) - queries.lse[i]);
  };
  if (softmax.is_symmetric) {
    sides([&](float& dot, float& sum, const auto& queries, int i, const auto& keys, int j) {
      const bool is_target = queries.target[i] == first_key + j;
      const float row = of_row(dot, queries, i, keys, j, is_target);
      const float c = logit(dot, softmax.scale, 0);
      const float column = exp2_approx((is_target ? as_stored(c) : c) - keys.column_lse[j]);
      const bool is_live = queries.lse[i] != INFINITY;
      // Of a target's -1, half is the row's.
      const float at_target = is_target ? queries.grad_target[i] : 0;
      if constexpr (!kOwnIsQuery) sum += row + at_target / 2;
      dot = row + at_target + (is_live ? keys.column_grad[j] * column : 0);
    });
  } else {
    sides([&](float& dot, float& sum, const auto& queries, int i, const auto& keys, int j) {
      const bool is_target = queries.target[i] == first_key + j;
      dot = of_row(dot, queries, i, keys, j, is_target);
      if (is_target) dot += queries.grad_target[i];
      if constexpr (!kOwnIsQuery) sum += dot;
    });
  }
}

template <typename Tile>
using OwnGradient = float[Tile::kM][Tile::kDim / 8][4];

// dX += ds Y of one warp; y is the whole tile.
template <typename Tile>
__device__ __forceinline__ void add_product(OwnGradient<Tile>& dx, const typename Tile::Logits& ds,
                                            const unsigned char* y) {
  using Number = typename Tile::Number;
  using Stored = typename Tile::Stored;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(Stored) == 2) {
    y += lane % 16 * Tile::kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < Tile::kN / 2; ++k) {
      Operand<4> a[Tile::kM];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &ds[m][2 * k + i / 2][i % 2 * 2];
          a[m].high[i] = pack<Stored>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < Tile::kDim / 8; n += 2) {
        std::uint32_t raw[4];
        load_matrices_transposed(raw, y + k * 16 * Tile::kRowBytes + n * 16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Operand<2> b{{raw[2 * half], raw[2 * half + 1]}, {}};
#pragma unroll
          for (int m = 0; m < Tile::kM; ++m) multiply<Number>(dx[m][n + half], a[m], b);
        }
      }
    }
  } else {
    const auto* values = reinterpret_cast<const std::uint32_t*>(y);
    constexpr int kRow = Tile::kRowBytes / 4;
    values += lane % 4 * 2 * kRow + lane / 4;
#pragma unroll
    for (int k = 0; k < Tile::kN; ++k) {
      Operand<4> a[Tile::kM];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
        const float* d = ds[m][k];
        const std::uint32_t raw[4] = {__float_as_uint(d[0]), __float_as_uint(d[2]),
                                      __float_as_uint(d[1]), __float_as_uint(d[3])};
        a[m] = to_operand<Number>(raw);
      }
#pragma unroll
      for (int n = 0; n < Tile::kDim / 8; ++n) {
        const std::uint32_t raw[2] = {values[8 * k * kRow + 8 * n],
                                      values[(8 * k + 1) * kRow + 8 * n]};
        const Operand<2> b = to_operand<Number>(raw);
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m) multiply<Number>(dx[m][n], a[m], b);
      }
    }
  }
}

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half_rn(value); }

// Largest |ds| after scaling: 16-bit ds keeps what is small beside 1.
template <typename Number>
constexpr float kLargestDs = std::is_same_v<Number, Float16> ? 4096.f : 1.f;

// A smaller upstream is taken for 0: dividing by it would overflow.
constexpr float kSmallestUpstream = 1e-34f;

// Writes dx times `factor` to rows first_row.. of (num, dim).
template <typename Tile, typename Value>
__device__ __forceinline__ void store_gradient(Value* to, const OwnGradient<Tile>& dx, float factor,
                                               int first_row, int num, int dim) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + 16 * m + 8 * h + lane / 4;
      if (row >= num) continue;
      Value* to_row = to + std::int64_t{row} * dim;
#pragma unroll
      for (int n = 0; n < Tile::kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + lane % 4 * 2 + e;
          if (column < dim) store(to_row + column, dx[m][n][2 * h + e] * factor);
        }
      }
    }
  }
}

template <typename Tile, bool kOwnIsQuery>
__global__ void __launch_bounds__(kThreads, 2)
    infonce_backward(InfonceOnDevice problem, int tiles_per_split, InfonceBackwardResults results) {
  using Number = typename Tile::Number;
  unsigned char* x = dynamic_shared();
  unsigned char* y = x + Tile::kOwnBytes;
  using Shared = BackwardShared<Tile, kOwnIsQuery>;
  auto& shared = *reinterpret_cast<Shared*>(y + 2 * Tile::kOtherBytes);
  const InfonceQueries& queries = problem.queries;
  const InfonceKeys& keys = problem.keys;
  const float inverse_tau = 1 / *problem.temperature;
  const Softmax softmax{scale_of(*problem.temperature), has_masks(problem),
                        keys.column_lse != nullptr};
  const float grad_scale = *results.grad_scale;
  const float to_scaled = grad_scale > kSmallestUpstream ? kLargestDs<Number> / grad_scale : 0;
  const float from_scaled = grad_scale / kLargestDs<Number>;

  const auto& own = [&]() -> const auto& {
    if constexpr (kOwnIsQuery)
      return queries;
    else
      return keys;
  }();
  const auto& other = [&]() -> const auto& {
    if constexpr (kOwnIsQuery)
      return keys;
    else
      return queries;
  }();
  const bool* own_is_live = kOwnIsQuery ? queries.is_live : nullptr;
  const bool* other_is_live = kOwnIsQuery ? nullptr : queries.is_live;
  const int first_own = blockIdx.x * Tile::kOwnRows;
  const int begin = blockIdx.y * tiles_per_split * Tile::kOtherRows;
  const int end = min(other.num, begin + tiles_per_split * Tile::kOtherRows);
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const auto load_other = [&](int first, int buffer) {
    load_tile<Tile, Tile::kOtherRows>(y + buffer * Tile::kOtherBytes, other.vectors, other.stride,
                                      problem.dim, first, end, other_is_live);
  };
  load_tile<Tile, Tile::kOwnRows>(x, own.vectors, own.stride, problem.dim, first_own, own.num,
                                  own_is_live);
  load_other(begin, 0);
  copy_async_commit();
  shared.own.put(thread, fetch(own, first_own + thread, to_scaled));
  shared.other[0].put(thread, fetch(other, begin + thread, to_scaled));

  OwnGradient<Tile> dx = {};
  float bias[Tile::kM][2] = {};
  int buffer = 0;
  for (int first_other = begin; first_other < end; first_other += Tile::kOtherRows, buffer ^= 1) {
    const int next_other = first_other + Tile::kOtherRows;
    if (next_other < end) load_other(next_other, buffer ^ 1);
    const auto next = fetch(other, next_other + thread, to_scaled);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    typename Tile::Logits z;
    multiply_rows<Tile, kOwnIsQuery>(z, x + warp * 16 * Tile::kM * Tile::kRowBytes,
                                     y + buffer * Tile::kOtherBytes);
    to_ds<Tile, kOwnIsQuery>(z, bias, problem, softmax, shared.own, first_own, shared.other[buffer],
                             first_other);
    add_product<Tile>(dx, z, y + buffer * Tile::kOtherBytes);
    shared.other[buffer ^ 1].put(thread, next);
    __syncthreads();
  }

  const int first_row = first_own + warp * 16 * Tile::kM;
  const bool is_whole = gridDim.y == 1;
  if (is_whole) {
    store_gradient<Tile>(static_cast<typename Tile::Stored*>(results.grad), dx,
                         from_scaled * inverse_tau, first_row, own.num, problem.dim);
  } else {
    store_gradient<Tile>(results.parts + std::int64_t{blockIdx.y} * own.num * problem.dim, dx,
                         from_scaled * inverse_tau, first_row, own.num, problem.dim);
  }
  if (!results.grad_bias) return;
  float* to_bias =
      is_whole ? results.grad_bias : results.bias_parts + std::int64_t{blockIdx.y} * own.num;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = bias[m][h];
      total += __shfl_xor_sync(0xffffffff, total, 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      const int row = first_row + 16 * m + 8 * h + thread % 32 / 4;
      if (thread % 4 == 0 && row < own.num) to_bias[row] = total * from_scaled;
    }
  }
}

// --- the parts of the splits together -----------------------------------------------------------

constexpr int kMostMergeBlocks = 4096;

template <typename Value>
__global__ void infonce_add_parts(const float* parts, int num_parts, std::int64_t size,
                                  Value* total) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += stride) {
    float sum = 0;
    for (int part = 0; part < num_parts; ++part) sum += parts[part * size + i];
    store(total + i, sum);
  }
}

template <typename Value>
cudaError_t add_parts(const float* parts, int num_parts, std::int64_t size, Value* total,
                      cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  const std::int64_t num_blocks = (size + kMergeThreads - 1) / kMergeThreads;
  return launch(infonce_add_parts<Value>,
                dim3(num_blocks < kMostMergeBlocks ? num_blocks : kMostMergeBlocks),
                dim3(kMergeThreads), 0, stream, parts, num_parts, size, total);
}

// --- launches -----------------------------------------------------------------------------------

template <typename Tile, bool kOwnIsQuery>
cudaError_t launch_tiles(const InfonceOnDevice& problem, InfonceGrid grid,
                         const InfonceBackwardResults& results, cudaStream_t stream) {
  static_assert(!must_fit_twice<Tile> ||
                backward_shared_bytes<Tile, kOwnIsQuery>() <= kSharedBytesOfTwo);
  const int num_own = kOwnIsQuery ? problem.queries.num : problem.keys.num;
  cudaError_t error = launch(
      infonce_backward<Tile, kOwnIsQuery>, dim3(grid.num_tiles, grid.num_splits), dim3(kThreads),
      backward_shared_bytes<Tile, kOwnIsQuery>(), stream, problem, grid.tiles_per_split, results);
  if (error != cudaSuccess || grid.num_splits == 1) return error;
  error = add_parts(results.parts, grid.num_splits, std::int64_t{num_own} * problem.dim,
                    static_cast<typename Tile::Stored*>(results.grad), stream);
  if (error != cudaSuccess || !results.grad_bias) return error;
  return add_parts(results.bias_parts, grid.num_splits, num_own, results.grad_bias, stream);
}

struct BackwardGrid {
  int num_own;
  int num_other;
  int num_blocks;
  InfonceGrid grid;

  template <typename Number, int kDim>
  int operator()() {
    using Tile = BackwardTile<Number, kDim>;
    grid = grid_of(num_own, Tile::kOwnRows, num_other, Tile::kOtherRows, num_blocks);
    return 0;
  }
};

struct LaunchBackward {
  bool own_is_query;
  const InfonceOnDevice& problem;
  InfonceGrid grid;
  const InfonceBackwardResults& results;
  cudaStream_t stream;

  template <typename Number, int kDim>
  int operator()() {
    using Tile = BackwardTile<Number, kDim>;
    return own_is_query ? launch_tiles<Tile, true>(problem, grid, results, stream)
                        : launch_tiles<Tile, false>(problem, grid, results, stream);
  }
};

}  // namespace

InfonceGrid infonce_backward_grid(Numbers numbers, int dim, int num_own, int num_other,
                                  int num_blocks) {
  BackwardGrid chosen{num_own, num_other, num_blocks, {}};
  dispatch(numbers, dim, chosen);
  return chosen.grid;
}

int launch_infonce_backward(Numbers numbers, bool own_is_query, const InfonceOnDevice& problem,
                            InfonceGrid grid, const InfonceBackwardResults& results,
                            CUstream_st* stream) {
  LaunchBackward backward{own_is_query, problem, grid, results, stream};
  return dispatch(numbers, problem.dim, backward);
}

}  // namespace torchrec_pt::device
