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
  const std::int64_t* exclude;          // (T,)
  const std::int64_t* exclude_offsets;  // (R + 1,); null: no row excludes anything
  std::int64_t num_excluded;            // T
};

// What is known of each row before it is drawn.
struct NegativesRows {
  float* log_scale;          // (R,) log of M / (1 - sum of the excluded q); over n where uniform
  std::uint64_t* mass_left;  // (R,) of the items that are not excluded
};

// All return a cudaError_t.
// Stops at a row or an excluded item that is none, or where nothing is left to draw.
int launch_negatives_rows(const NegativesOnDevice& problem, NegativesRows rows,
                          CUstream_st* stream);
// items (R, M); log_q (R, M), null where uniform.
int launch_negatives_draw(const NegativesOnDevice& problem, NegativesRows rows, std::int64_t* items,
                          float* log_q, CUstream_st* stream);
// (N, 4) words of (N, 4) counters.
int launch_philox(const std::int64_t* counters, const std::int64_t* key, std::int64_t num,
                  std::int64_t* words, CUstream_st* stream);

}  // namespace torchrec_pt::device
