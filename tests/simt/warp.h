// Barriers, shuffles and votes.

#pragma once

#include <cstring>

#include "simt/types.h"

namespace simt {

enum class Shuffle { kIndex, kUp, kDown, kXor };

void sync_threads(Site site);
void sync_warp(std::uint32_t mask, Site site);
std::uint64_t shuffle(Shuffle kind, std::uint32_t mask, std::uint64_t bits, int operand, int width,
                      Site site);
// The lanes of the mask whose predicate holds; `existing` are the lanes of the mask there are.
std::uint32_t vote(std::uint32_t mask, bool predicate, std::uint32_t& existing, Site site);

template <typename T>
T shuffle_value(Shuffle kind, std::uint32_t mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::sync_threads(site); }

inline void __syncwarp(std::uint32_t mask = 0xffffffff, simt::Site site = simt::Site::current()) {
  simt::sync_warp(mask, site);
}

template <typename T>
T __shfl_sync(std::uint32_t mask, T value, int lane, int width = 32,
              simt::Site site = simt::Site::current()) {
  return simt::shuffle_value(simt::Shuffle::kIndex, mask, value, lane, width, site);
}

template <typename T>
T __shfl_up_sync(std::uint32_t mask, T value, unsigned delta, int width = 32,
                 simt::Site site = simt::Site::current()) {
  return simt::shuffle_value(simt::Shuffle::kUp, mask, value, static_cast<int>(delta), width, site);
}

template <typename T>
T __shfl_down_sync(std::uint32_t mask, T value, unsigned delta, int width = 32,
                   simt::Site site = simt::Site::current()) {
  return simt::shuffle_value(simt::Shuffle::kDown, mask, value, static_cast<int>(delta), width,
                             site);
}

template <typename T>
T __shfl_xor_sync(std::uint32_t mask, T value, int lane_mask, int width = 32,
                  simt::Site site = simt::Site::current()) {
  return simt::shuffle_value(simt::Shuffle::kXor, mask, value, lane_mask, width, site);
}

inline std::uint32_t __ballot_sync(std::uint32_t mask, int predicate,
                                   simt::Site site = simt::Site::current()) {
  std::uint32_t existing;
  return simt::vote(mask, predicate != 0, existing, site);
}

inline int __any_sync(std::uint32_t mask, int predicate, simt::Site site = simt::Site::current()) {
  std::uint32_t existing;
  return simt::vote(mask, predicate != 0, existing, site) != 0;
}

inline int __all_sync(std::uint32_t mask, int predicate, simt::Site site = simt::Site::current()) {
  std::uint32_t existing;
  const std::uint32_t votes = simt::vote(mask, predicate != 0, existing, site);
  return votes == existing;
}
