// The table's gradient of sampled_softmax on CUDA, from pairs that are sorted by item (formula and
// shapes: sampled_softmax.h).
//
// A thread has four columns of a chunk of 64 pairs; neighbours have neighbouring columns, so that a
// row of the query is read together. It adds up coefficient q_b of each slot (an item's row of the
// gradient) and writes the slots that lie in its chunk alone. Of a slot that crosses into the next
// chunk each chunk leaves a part; the second kernel adds the parts in order, in the thread where
// the slot begins. Every row is written once: the bits do not depend on the order of blocks.
//
// Reads B (M + 1) (D + 6) values, mostly from L2, writes the rows that are named, and at most
// B (M + 1) D / 32 values of parts.

#include "device/cuda.cuh"
#include "sampled_softmax/sampled_softmax_device.h"
#include "sampled_softmax/sampled_softmax_vectors.cuh"

namespace torchrec_pt::device {
namespace {

constexpr int kThreads = 256;

// What a thread has of the pairs.
struct Place {
  __device__ __forceinline__ Place(const SampledSoftmaxPairs& pairs, std::int64_t index)
      : num_quads((pairs.dim + 3) / 4),
        chunk(index / num_quads),
        column(static_cast<int>(index % num_quads) * 4),
        begin(chunk * kPairsPerChunk),
        end(min(begin + kPairsPerChunk, pairs.num_pairs)),
        part((chunk * num_quads) * 4 + column) {}

  int num_quads;
  std::int64_t chunk;
  int column;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t part;  // where its part of a slot is kept
};

__device__ __forceinline__ std::int64_t thread_index() {
  return std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
}

__device__ __forceinline__ bool continues(const SampledSoftmaxPairs& pairs, std::int64_t pair) {
  return pair > 0 && pair < pairs.num_pairs && pairs.slot[pair] == pairs.slot[pair - 1];
}

__device__ __forceinline__ bool has_vectors(const SampledSoftmaxPairs& pairs) {
  return pairs.dim % 4 == 0;
}

__device__ __forceinline__ void add_pair(float (&sum)[4], const SampledSoftmaxPairs& pairs,
                                         std::int64_t pair, int column) {
  const unsigned width = pairs.num_negatives + 1;
  const auto number = static_cast<unsigned>(pairs.number[pair]);
  const unsigned row = number / width;
  const float scale = pairs.scale[row];
  if (scale == 0) return;  // also where p or the query are no numbers
  const float ds = number % width == 0 ? pairs.minus_sum_of_p[row] : pairs.p[number - row - 1];
  float query[4];
  load_quad(query, pairs.query + std::int64_t{row} * pairs.dim, 1, column, pairs.dim,
            has_vectors(pairs));
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += scale * ds * query[i];
}

template <typename T>
__device__ __forceinline__ void write_row(T* grad, const SampledSoftmaxPairs& pairs,
                                          std::int64_t slot, int column, const float (&sum)[4]) {
  TORCHREC_PT_DEVICE_ASSERT(slot >= 0 && slot < pairs.num_slots);
  store_quad(grad + slot * pairs.dim, sum, column, pairs.dim, has_vectors(pairs));
}

__device__ __forceinline__ void write_part(float* part, const float (&sum)[4]) {
  store_quad(part, sum, 0, 4, true);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sampled_softmax_sum_chunks(SampledSoftmaxPairs pairs, SampledSoftmaxParts parts, T* grad) {
  const Place place(pairs, thread_index());
  if (place.begin >= pairs.num_pairs) return;
  bool began_earlier = continues(pairs, place.begin);
  float sum[4] = {};
  for (std::int64_t pair = place.begin; pair < place.end; ++pair) {
    if (pair > place.begin && !continues(pairs, pair)) {
      if (began_earlier) {
        write_part(parts.head + place.part, sum);
      } else {
        write_row(grad, pairs, pairs.slot[pair - 1], place.column, sum);
      }
      began_earlier = false;
#pragma unroll
      for (float& value : sum) value = 0;
    }
    add_pair(sum, pairs, pair, place.column);
  }
  if (began_earlier) {
    write_part(parts.head + place.part, sum);
  } else if (continues(pairs, place.end)) {
    write_part(parts.tail + place.part, sum);
  } else {
    write_row(grad, pairs, pairs.slot[place.end - 1], place.column, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sampled_softmax_merge_chunks(SampledSoftmaxPairs pairs, SampledSoftmaxParts parts, T* grad) {
  const Place place(pairs, thread_index());
  if (!continues(pairs, place.end)) return;
  const std::int64_t slot = pairs.slot[place.end];
  const bool began_earlier = place.begin > 0 && pairs.slot[place.begin - 1] == slot;
  if (began_earlier) return;
  float sum[4];
  load_quad(sum, parts.tail + place.part, 1, 0, 4, true);
  const float* head = parts.head + place.part;
  for (std::int64_t begin = place.end; begin < pairs.num_pairs && pairs.slot[begin] == slot;
       begin += kPairsPerChunk) {
    head += place.num_quads * 4;
    float more[4];
    load_quad(more, head, 1, 0, 4, true);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += more[i];
  }
  write_row(grad, pairs, slot, place.column, sum);
}

struct LaunchBackward {
  const SampledSoftmaxPairs& pairs;
  const SampledSoftmaxParts& parts;
  void* grad;
  cudaStream_t stream;

  template <typename T>
  int operator()() const {
    const std::int64_t num_chunks = (pairs.num_pairs + kPairsPerChunk - 1) / kPairsPerChunk;
    const std::int64_t num_threads = num_chunks * ((pairs.dim + 3) / 4);
    const dim3 grid(static_cast<unsigned>((num_threads + kThreads - 1) / kThreads));
    const auto run = [&](auto kernel) {
      return launch(kernel, grid, dim3(kThreads), 0, stream, pairs, parts, static_cast<T*>(grad));
    };
    const cudaError_t error = run(sampled_softmax_sum_chunks<T>);
    return error == cudaSuccess ? run(sampled_softmax_merge_chunks<T>) : error;
  }
};

}  // namespace

int launch_sampled_softmax_backward(Stored stored, const SampledSoftmaxPairs& pairs,
                                    const SampledSoftmaxParts& parts, void* grad,
                                    CUstream_st* stream) {
  return dispatch(stored, LaunchBackward{pairs, parts, grad, stream});
}

}  // namespace torchrec_pt::device
