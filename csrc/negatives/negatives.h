// negatives: items drawn for rows, never one of those that a row excludes.
//
// For row r of R and draw d of M:  item i with probability q_i / (1 - sum of q over the row's
// excluded items), and the log of how often i is expected among the row's M draws. How a draw is
// made: draw.h. Every row's draws depend on (seed, step, global row) alone.

#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include "negatives/draw.h"
#include "tensors.h"

namespace torchrec_pt {

struct NegativesProblem {
  at::Tensor rows;    // (R,) int64 global rows, in [0, 2^32)
  int64_t num_draws;  // M
  int64_t num_items;  // n
  int64_t seed;       // in [0, 2^32), like step
  int64_t step;
  OptionalTensor columns;          // (n, 4) int32, the AliasColumns; none: uniform
  OptionalTensor mass;             // (n,) int64, with columns: q_i = mass_i / (n 2^32)
  OptionalTensor exclude;          // (T,) int64 items, each row's strictly ascending
  OptionalTensor exclude_offsets;  // (R + 1,) int64, with exclude
};

// Raise ValueError with one line where shapes, dtypes, devices or ranges are wrong.
void check_negatives(const NegativesProblem& problem);
// counters (N, 4) and key (2,), int64.
void check_philox(const at::Tensor& counters, const at::Tensor& key);

inline ItemDistribution distribution_of(const NegativesProblem& problem) {
  const auto n = static_cast<std::uint32_t>(problem.num_items);
  const auto* columns = data_or_null<int32_t>(problem.columns);
  return {reinterpret_cast<const AliasColumn*>(columns), data_or_null<int64_t>(problem.mass), n,
          static_cast<std::uint32_t>((std::uint64_t{1} << 32) % n)};
}

inline PhiloxKey key_of(const NegativesProblem& problem) {
  return {static_cast<std::uint32_t>(problem.seed), static_cast<std::uint32_t>(problem.step)};
}

// The mass of all items: one each where the distribution is uniform.
inline std::uint64_t total_mass(const NegativesProblem& problem) {
  const auto n = static_cast<std::uint64_t>(problem.num_items);
  return problem.columns ? n << 32 : n;
}

// Where the distribution is uniform, a row's draws share one log of the expected count.
inline at::Tensor empty_log_q(const NegativesProblem& problem) {
  return at::empty({problem.rows.size(0), problem.columns ? problem.num_draws : 1},
                   problem.rows.options().dtype(at::kFloat));
}

}  // namespace torchrec_pt
