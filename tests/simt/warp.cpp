#include "simt/warp.h"

#include <string>

#include "simt/executor.h"

namespace simt {
namespace {

// Words 0 and 1: the value, then the result. 2: kind. 3: lane, delta or mask. 4: width.
void execute_shuffle(Warp& warp, std::uint32_t mask) {
  std::uint32_t results[2][32];
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const int operand = static_cast<int>(warp.words[3][lane]);
    const int width = static_cast<int>(warp.words[4][lane]);
    const int first = lane & -width;  // of the lane's segment
    int source = lane;
    switch (static_cast<Shuffle>(warp.words[2][lane])) {
      case Shuffle::kIndex:
        source = first + (operand & (width - 1));
        break;
      case Shuffle::kUp:
        if (lane - operand >= first) source = lane - operand;
        break;
      case Shuffle::kDown:
        if (lane + operand < first + width) source = lane + operand;
        break;
      case Shuffle::kXor:
        if ((lane ^ operand) < first + width) source = lane ^ operand;
        break;
    }
    if ((mask >> source & 1) == 0) {
      active_executor->fail(warp.threads[lane], "wrong mask",
                            "shuffles from lane " + std::to_string(source) +
                                ", which takes no part" + describe(warp.threads[lane].site));
    }
    results[0][lane] = warp.words[0][source];
    results[1][lane] = warp.words[1][source];
  }
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    warp.words[0][lane] = results[0][lane];
    warp.words[1][lane] = results[1][lane];
  }
}

// Word 0: the predicate, then the votes.
void execute_vote(Warp& warp, std::uint32_t mask) {
  std::uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (warp.words[0][lane] & 1) << lane & mask;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) warp.words[0][lane] = votes;
  }
}

// Only a barrier of the whole warp is remembered as one. Shuffles and votes are none at all: CUDA
// gives them no order of memory.
void execute_barrier(Warp& warp, std::uint32_t mask) {
  if (mask == warp.existing) active_executor->advance_warp_epoch(warp);
}

constexpr Collective kShuffle = {"shuffle", false, execute_shuffle};
constexpr Collective kVote = {"vote", false, execute_vote};
constexpr Collective kBarrier = {"__syncwarp", false, execute_barrier};

}  // namespace

void sync_threads(Site site) { active_executor->join_barrier(site); }

void sync_warp(std::uint32_t mask, Site site) { active_executor->join(kBarrier, mask, site); }

std::uint64_t shuffle(Shuffle kind, std::uint32_t mask, std::uint64_t bits, int operand, int width,
                      Site site) {
  const Thread& thread = active_executor->current();
  auto& words = thread.warp->words;
  words[0][thread.lane] = static_cast<std::uint32_t>(bits);
  words[1][thread.lane] = static_cast<std::uint32_t>(bits >> 32);
  words[2][thread.lane] = static_cast<std::uint32_t>(kind);
  words[3][thread.lane] = static_cast<std::uint32_t>(operand);
  words[4][thread.lane] = static_cast<std::uint32_t>(width);
  active_executor->join(kShuffle, mask, site);
  return words[0][thread.lane] | static_cast<std::uint64_t>(words[1][thread.lane]) << 32;
}

std::uint32_t vote(std::uint32_t mask, bool predicate, std::uint32_t& existing, Site site) {
  const Thread& thread = active_executor->current();
  auto& words = thread.warp->words;
  existing = mask & thread.warp->existing;
  words[0][thread.lane] = predicate;
  active_executor->join(kVote, mask, site);
  return words[0][thread.lane];
}

}  // namespace simt
