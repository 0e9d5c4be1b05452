// What the CUDA kernels of infonce are given: plain pointers to device memory, so that their
// sources need neither torch nor ATen. Formula and shapes: infonce.h. B queries, N keys.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace torchrec_pt::device {

// How the numbers of a product are stored and multiplied; sums are float32 everywhere.
enum class Numbers {
  kBfloat16,
  kFloat16,
  kTf32,    // float32 rounded to 10 bits of mantissa
  kTf32x3,  // float32 as the sum of two tf32: three products, close to float32
};

// A pointer that may be null says so with what null means.
struct InfonceQueries {
  const void* vectors;             // (B, stride): 16-byte aligned rows
  std::int64_t stride;             // elements between rows
  int num;                         // B
  const bool* is_live;             // (B,); null: all. The others take part in nothing
  const std::int64_t* target;      // (B,); null: none
  const float* positive_shift;     // (B,) key_bias_t - log_q_positive; null: 0
  const std::int64_t* target_id;   // (B,) key_id of the target; null: no such mask
  const std::int64_t* query_id;    // (B,); null: no such mask
  const std::int64_t* self_index;  // (B,); null: none
  // Backward only.
  const float* lse;          // (B,)
  const float* grad;         // (B,) ds_ij = grad_i p_ij + ...
  const float* grad_target;  // (B,) ... + grad_target_i [j = t_i]
};

struct InfonceKeys {
  const void* vectors;  // (N, stride)
  std::int64_t stride;
  int num;                           // N
  const float* shift;                // (N,) key_bias - log_q; null: 0
  const std::int64_t* key_id;        // (N,); null: no such mask
  const std::int64_t* key_query_id;  // (N,); null: no such mask
  // Symmetric backward only: ... + column_grad_j exp(c_ij - column_lse_j) for j < num_columns.
  int num_columns;
  const float* column_lse;   // (num_columns,); null: one direction
  const float* column_grad;  // (num_columns,)
};

struct InfonceOnDevice {
  InfonceQueries queries;
  InfonceKeys keys;
  int dim;                   // D, at most kMostDims
  const float* temperature;  // ()
};

constexpr int kMostDims = 256;

// max_j s_j, sum_j 2^(s_j - highest) and the same sum with weights q . k_j, in log2 units.
struct SoftmaxSums {
  float highest;
  float sum;
  float dot;
};

// Blocks of threads: tiles of own rows times splits of the other side. Each split leaves a part.
struct InfonceGrid {
  int num_tiles;
  int num_splits;
  int tiles_per_split;  // of the other side
  int num_at_once;      // tiles of one launch; num_tiles but for the column sums of forward
};

// `num_blocks` is how many should run at once to fill the device. The column sums of at most
// `most_tiles` tiles of queries are kept at a time: memory stays linear in N.
InfonceGrid infonce_forward_grid(Numbers numbers, int dim, int num_rows, int num_keys,
                                 int most_tiles, int num_blocks);
InfonceGrid infonce_backward_grid(Numbers numbers, int dim, int num_own, int num_other,
                                  int num_blocks);

struct InfonceForwardResults {
  SoftmaxSums* row_parts;     // (num_splits, B) scratch
  float* positive_dot;        // (B,) q . k_t; not written for a row without target
  SoftmaxSums* rows;          // (B,)
  SoftmaxSums* column_parts;  // (num_at_once, num_columns) scratch; null: one direction
  SoftmaxSums* columns;       // (num_columns,)
};

struct InfonceBackwardResults {
  void* grad;         // (M, D) in the numbers' type, contiguous
  float* grad_bias;   // (M,) sum of ds over the rows; null: not wanted
  float* parts;       // (num_splits, M, D) scratch where num_splits > 1
  float* bias_parts;  // (num_splits, M) scratch where num_splits > 1
  // () max |grad|, |grad_target|, |column_grad|: ds is divided by it, so that it fits 16 bits.
  const float* grad_scale;
};

// All return a cudaError_t.
int launch_infonce_forward(Numbers numbers, const InfonceOnDevice& problem, InfonceGrid grid,
                           const InfonceForwardResults& results, CUstream_st* stream);
// The gradient of the queries (own_is_query) or of the keys: one kernel, roles exchanged.
int launch_infonce_backward(Numbers numbers, bool own_is_query, const InfonceOnDevice& problem,
                            InfonceGrid grid, const InfonceBackwardResults& results,
                            CUstream_st* stream);

struct InfonceRowOutputs {  // (B,) each
  float* lse;
  float* positive;
  float* expected_dot;
};
int launch_infonce_rows(const InfonceOnDevice& problem, const SoftmaxSums* rows,
                        const float* positive_dot, const InfonceRowOutputs& outputs,
                        CUstream_st* stream);

struct InfoncePairOutputs {  // (B,) each
  float* loss;
  float* lse;
  float* column_lse;
  float* slope;
};
int launch_infonce_pairs(const InfonceOnDevice& problem, const SoftmaxSums* rows,
                         const SoftmaxSums* columns, const float* positive_dot,
                         const InfoncePairOutputs& outputs, CUstream_st* stream);

}  // namespace torchrec_pt::device
