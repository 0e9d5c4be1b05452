// Forward of sampled_softmax on CUDA (formula and shapes: sampled_softmax.h).
//
// A block takes one row of the batch. Groups of 8, 16 or 32 lanes read one row of the table at a
// time, a few of them on their way at once, four values to a lane: the dot product by shuffles,
// then the running maximum, sum and weighted sum of rows in registers. A group begins with the
// positive's logit as its maximum, which leaves no case without one. The groups are merged through
// shared memory. Until then the place of p holds s, which each lane turns into p where it wrote it.
//
// Reads B (M + 1) D values of the table, and each row's positive once more for each group, from the
// cache; writes B (M + D) values.

#include "device/cuda.cuh"
#include "device/ptx.cuh"
#include "sampled_softmax/sampled_softmax_device.h"
#include "sampled_softmax/sampled_softmax_vectors.cuh"

namespace torchrec_pt::device {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// How many lanes share a row of the table, and how many of its quads each of them has.
template <int kLanesOfRow, int kQuadsOfLane>
struct Layout {
  static constexpr int kLanes = kLanesOfRow;
  static constexpr int kQuads = kQuadsOfLane;
  static constexpr int kDims = 4 * kLanes * kQuads;
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kBatch = kQuads <= 2 ? 2 : 1;  // rows read at once
  static constexpr int kRowsAtOnce = kGroups * kBatch;

  using Vector = float[kQuads][4];  // this lane's share of a row
};

template <typename Layout>
struct Shared {
  alignas(16) float query[Layout::kDims];  // zeros from D on
  float highest[Layout::kGroups];
  float sum[Layout::kGroups];
  float direction[Layout::kGroups][Layout::kDims];
};

template <typename T>
__device__ __forceinline__ T at(const Strided<T>& tensor, int row, int column = 0) {
  return tensor.values[row * tensor.row_stride + column * tensor.column_stride];
}

template <typename T>
__device__ __forceinline__ const T* row_of(const Strided<void>& table, std::int64_t id) {
  return static_cast<const T*>(table.values) + id * table.row_stride;
}

template <typename Layout, typename T>
__device__ __forceinline__ void load(typename Layout::Vector& vector, const T* row,
                                     std::int64_t stride, int dim, bool has_vectors) {
#pragma unroll
  for (int n = 0; n < Layout::kQuads; ++n) {
    const int first = 4 * (n * Layout::kLanes + threadIdx.x % Layout::kLanes);
    load_quad(vector[n], row, stride, first, dim, has_vectors);
  }
}

// The dot product of a row with the query, in each lane of its group.
template <typename Layout>
__device__ __forceinline__ float dot(const Shared<Layout>& shared,
                                     const typename Layout::Vector& row) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < Layout::kQuads; ++n) {
    float query[4];
    const int first = 4 * (n * Layout::kLanes + threadIdx.x % Layout::kLanes);
    load_quad(query, shared.query, 1, first, Layout::kDims, true);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += query[i] * row[n][i];
  }
#pragma unroll
  for (int other = Layout::kLanes / 2; other > 0; other /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, other);
  }
  return sum;
}

// sum += weight vector
template <typename Layout>
__device__ __forceinline__ void add(typename Layout::Vector& sum, float weight,
                                    const typename Layout::Vector& vector) {
#pragma unroll
  for (int n = 0; n < Layout::kQuads; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] += weight * vector[n][i];
  }
}

template <typename Layout>
__device__ __forceinline__ void scale_by(typename Layout::Vector& sum, float factor) {
#pragma unroll
  for (int n = 0; n < Layout::kQuads; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] *= factor;
  }
}

// Which row of the table a negative reads, and what is added to its logit in log2 units. One that
// is masked reads the positive's row, so that what its own holds does not matter.
struct Negative {
  std::int64_t id;
  float shift;
};

__device__ __forceinline__ Negative negative_at(const SampledSoftmaxOnDevice& problem, int row,
                                                int m, std::int64_t positive) {
  const Negative masked{positive, -INFINITY};
  if (m >= problem.num_negatives) return masked;
  const std::int64_t id = at(problem.negatives, row, m);
  TORCHREC_PT_DEVICE_ASSERT(id >= 0 && id < problem.num_items);
  if (id == positive) return masked;
  if (!problem.log_q_negatives.values) return {id, 0};
  const float log_q = at(problem.log_q_negatives, row, m);
  return log_q == INFINITY ? masked : Negative{id, -log_q * kLog2E};
}

// The softmax over the negatives that a group has seen: its sums are relative to 2^highest.
template <typename Layout>
struct Running {
  float highest;
  float sum;
  typename Layout::Vector direction;
};

// Adds the kBatch negatives from `first` on; s receives their logits.
template <typename T, typename Layout>
__device__ __forceinline__ void add_batch(Running<Layout>& running, float (&s)[Layout::kBatch],
                                          const SampledSoftmaxOnDevice& problem,
                                          const Shared<Layout>& shared, float scale, int row,
                                          int first, std::int64_t positive) {
  Negative negatives[Layout::kBatch];
#pragma unroll
  for (int r = 0; r < Layout::kBatch; ++r) {
    negatives[r] = negative_at(problem, row, first + r, positive);
  }
  typename Layout::Vector rows[Layout::kBatch];
#pragma unroll
  for (int r = 0; r < Layout::kBatch; ++r) {
    load<Layout>(rows[r], row_of<T>(problem.table, negatives[r].id), problem.table.column_stride,
                 problem.dim, problem.has_vectors);
  }
  float highest = running.highest;
#pragma unroll
  for (int r = 0; r < Layout::kBatch; ++r) {
    s[r] = dot(shared, rows[r]) * scale + negatives[r].shift;
    highest = fmaxf(highest, s[r]);
  }
  const float factor = exp2_approx(running.highest - highest);
  running.highest = highest;
  running.sum *= factor;
  scale_by<Layout>(running.direction, factor);
#pragma unroll
  for (int r = 0; r < Layout::kBatch; ++r) {
    const float e = exp2_approx(s[r] - highest);
    running.sum += e;
    add<Layout>(running.direction, e, rows[r]);
  }
}

template <typename Layout>
__device__ __forceinline__ void share(Shared<Layout>& shared, const Running<Layout>& running) {
  const int group = threadIdx.x / Layout::kLanes;
  const int lane = threadIdx.x % Layout::kLanes;
  if (lane == 0) {
    shared.highest[group] = running.highest;
    shared.sum[group] = running.sum;
  }
#pragma unroll
  for (int n = 0; n < Layout::kQuads; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared.direction[group][4 * (n * Layout::kLanes + lane) + i] = running.direction[n][i];
    }
  }
}

template <typename T, typename Layout>
__global__ void __launch_bounds__(kThreads)
    sampled_softmax_forward(SampledSoftmaxOnDevice problem, SampledSoftmaxResults results) {
  auto& shared = *reinterpret_cast<Shared<Layout>*>(dynamic_shared());
  const int row = blockIdx.x;
  const int group = threadIdx.x / Layout::kLanes;
  const int lane = threadIdx.x % Layout::kLanes;
  const float scale = kLog2E / *problem.temperature;
  float* const p = results.p + std::int64_t{row} * problem.num_negatives;

  const std::int64_t positive = at(problem.positive, row);
  TORCHREC_PT_DEVICE_ASSERT(positive >= 0 && positive < problem.num_items);
  const T* const positive_row = row_of<T>(problem.table, positive);
  for (int d = threadIdx.x; d < Layout::kDims; d += kThreads) {
    shared.query[d] = d < problem.dim ? problem.query[std::int64_t{row} * problem.dim + d] : 0;
  }
  __syncthreads();
  Running<Layout> running{};
  load<Layout>(running.direction, positive_row, problem.table.column_stride, problem.dim,
               problem.has_vectors);
  float positive_logit = dot(shared, running.direction) * scale;
  if (problem.log_q_positive.values) positive_logit -= at(problem.log_q_positive, row) * kLog2E;
  running = {positive_logit, 0, {}};

  // As often for each group: all lanes of a warp take part in a shuffle.
  for (int start = 0; start < problem.num_negatives; start += Layout::kRowsAtOnce) {
    const int first = start + group * Layout::kBatch;
    float s[Layout::kBatch];
    add_batch<T>(running, s, problem, shared, scale, row, first, positive);
#pragma unroll
    for (int r = 0; r < Layout::kBatch; ++r) {
      if (results.with_gradients && lane == r && first + r < problem.num_negatives)
        p[first + r] = s[r];
    }
  }
  share(shared, running);
  __syncthreads();

  float highest = shared.highest[0];
#pragma unroll
  for (int g = 1; g < Layout::kGroups; ++g) highest = fmaxf(highest, shared.highest[g]);
  float factor[Layout::kGroups];
  float sum = 0;
#pragma unroll
  for (int g = 0; g < Layout::kGroups; ++g) {
    factor[g] = exp2_approx(shared.highest[g] - highest);
    sum += factor[g] * shared.sum[g];
  }
  const float of_positive = exp2_approx(positive_logit - highest);
  if (threadIdx.x == 0) {
    // log(of_positive + sum), exact also where that is close to 1.
    results.loss[row] = (highest - positive_logit) * kLn2 + log1pf(sum + (of_positive - 1));
  }
  if (!results.with_gradients) return;
  const float inverse = 1 / (of_positive + sum);
  for (int start = 0; start < problem.num_negatives; start += Layout::kRowsAtOnce) {
    const int m = start + group * Layout::kBatch + lane;
    if (lane < Layout::kBatch && m < problem.num_negatives) {
      p[m] = exp2_approx(p[m] - highest) * inverse;
    }
  }
  for (int d = threadIdx.x; d < problem.dim; d += kThreads) {
    float direction = -sum * to_float(positive_row[d * problem.table.column_stride]);
#pragma unroll
    for (int g = 0; g < Layout::kGroups; ++g) direction += factor[g] * shared.direction[g][d];
    results.direction[std::int64_t{row} * problem.dim + d] = direction * inverse;
  }
}

template <typename T, typename Layout>
cudaError_t launch_rows(const SampledSoftmaxOnDevice& problem, const SampledSoftmaxResults& results,
                        cudaStream_t stream) {
  return launch(sampled_softmax_forward<T, Layout>, dim3(problem.num_rows), dim3(kThreads),
                sizeof(Shared<Layout>), stream, problem, results);
}

struct LaunchForward {
  const SampledSoftmaxOnDevice& problem;
  const SampledSoftmaxResults& results;
  cudaStream_t stream;

  template <typename T>
  int operator()() const {
    if (problem.dim <= 32) return launch_rows<T, Layout<8, 1>>(problem, results, stream);
    if (problem.dim <= 64) return launch_rows<T, Layout<16, 1>>(problem, results, stream);
    if (problem.dim <= 128) return launch_rows<T, Layout<32, 1>>(problem, results, stream);
    if (problem.dim <= 256) return launch_rows<T, Layout<32, 2>>(problem, results, stream);
    static_assert(kMostDims == Layout<32, 8>::kDims);
    return launch_rows<T, Layout<32, 8>>(problem, results, stream);
  }
};

}  // namespace

int launch_sampled_softmax_forward(Stored stored, const SampledSoftmaxOnDevice& problem,
                                   const SampledSoftmaxResults& results, CUstream_st* stream) {
  return dispatch(stored, LaunchForward{problem, results, stream});
}

}  // namespace torchrec_pt::device
