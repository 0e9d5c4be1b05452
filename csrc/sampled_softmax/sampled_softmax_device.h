// What the CUDA kernels of sampled_softmax are given: plain pointers to device memory, so that
// their sources need neither torch nor ATen. Formula and shapes: sampled_softmax.h.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace torchrec_pt::device {

// How the table, or its gradient, is stored; all else is float32.
enum class Stored { kFloat32, kBfloat16, kFloat16 };

constexpr int kMostDims = 1024;

// A matrix or, without column_stride, a vector; strides are in elements.
template <typename T>
struct Strided {
  const T* values;
  std::int64_t row_stride;
  std::int64_t column_stride;
};

struct SampledSoftmaxOnDevice {
  const float* query;               // (B, D) contiguous
  Strided<void> table;              // (V, D)
  bool has_vectors;                 // four values of a row of the table can be read at once
  Strided<std::int64_t> positive;   // (B,)
  Strided<std::int64_t> negatives;  // (B, M)
  const float* temperature;         // ()
  Strided<float> log_q_positive;    // (B,); null: 0
  Strided<float> log_q_negatives;   // (B, M); null: 0
  int num_rows;                     // B
  int num_negatives;                // M
  std::int64_t num_items;           // V
  int dim;                          // D, at most kMostDims
};

struct SampledSoftmaxResults {
  float* loss;  // (B,)
  bool with_gradients;
  float* p;          // (B, M) contiguous
  float* direction;  // (B, D) contiguous
};

// The table's gradient: the pairs of an item and a row of the batch, sorted by item. Pair number
// b (M + 1) + j is candidate j of row b: its positive for j = 0, else negative j - 1.
struct SampledSoftmaxPairs {
  const std::int64_t* slot;    // (num_pairs,) ascending: which row of the gradient
  const std::int64_t* number;  // (num_pairs,)
  std::int64_t num_pairs;      // B (M + 1)
  std::int64_t num_slots;
  const float* scale;           // (B,) g / tau; 0: the row takes part in nothing
  const float* minus_sum_of_p;  // (B,)
  const float* p;               // (B, M)
  const float* query;           // (B, D) contiguous, aligned to 16 bytes
  int num_negatives;            // M
  int dim;                      // D
};

constexpr int kPairsPerChunk = 64;

// What the chunks leave of slots that they do not have to themselves.
struct SampledSoftmaxParts {
  float* head;  // (num_chunks, D): of the slot that began in an earlier chunk
  float* tail;  // (num_chunks, D): of the slot that goes on in the next, where it began in this
};

// All return a cudaError_t.
int launch_sampled_softmax_forward(Stored stored, const SampledSoftmaxOnDevice& problem,
                                   const SampledSoftmaxResults& results, CUstream_st* stream);
// Writes each row of grad (num_slots, D) that a pair names.
int launch_sampled_softmax_backward(Stored stored, const SampledSoftmaxPairs& pairs,
                                    const SampledSoftmaxParts& parts, void* grad,
                                    CUstream_st* stream);

}  // namespace torchrec_pt::device
