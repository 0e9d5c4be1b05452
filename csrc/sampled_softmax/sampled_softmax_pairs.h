// The pairs (id, number) of sampled_softmax, sorted by id.

#pragma once

#include <cstdint>
#include <memory>

namespace torchrec_pt {

// Pair number b (M + 1) + j is candidate j of row b: its positive for j = 0, else negative j - 1.
struct Pair {
  uint32_t number;
  uint32_t id;
};

// Stable: pairs of one id stay in order, whatever the number of threads. Takes as much memory again
// while it runs.
void sort_by_id(std::unique_ptr<Pair[]>& pairs, int64_t size, int64_t num_ids);

}  // namespace torchrec_pt
