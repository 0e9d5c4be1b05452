// What the CUDA kernels of negatives are given: plain pointers to device memory, so that their
// source needs neither torch nor ATen. Formula and shapes: negatives.h. R rows, M draws of each.

#pragma once

#include <cstdint>

#include "negatives/draw.h"

struct CUstream_st;

namespace torchrec_pt::device {

struct NegativesOnDevice {
  const std::int64_t* rows;  // (R,)
  std::int64_t num_rows;
  std::int64_t num_draws;
  ItemDistribution distribution;
  PhiloxKey key;
  std::uint64_t total_mass;
  const std::int64_t* mass;             // (n,); null: one each
  const std::int64_t* exclude;          // (T,)
  const std::int64_t* exclude_offsets;  // (R + 1,); null: no row excludes anything
  std::int64_t num_excluded;            // T
};

// Both return a cudaError_t.
// log_scale[r]: the log of M / (1 - sum of the excluded items' q); over n where uniform. Stops at a
// row or an excluded item that is none, or that leaves nothing to draw.
int launch_negatives_rows(const NegativesOnDevice& problem, float* log_scale, CUstream_st* stream);
// items (R, M); log_q (R, M), null where uniform.
int launch_negatives_draw(const NegativesOnDevice& problem, const float* log_scale,
                          std::int64_t* items, float* log_q, CUstream_st* stream);
// (N, 4) words of (N, 4) counters.
int launch_philox(const std::int64_t* counters, const std::int64_t* key, std::int64_t num,
                  std::int64_t* words, CUstream_st* stream);

}  // namespace torchrec_pt::device
