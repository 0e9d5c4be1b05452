// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011):
// a counter of four words and a key of two give four random words. Integer arithmetic alone, so
// that every device gives the same.

#pragma once

#include <cstdint>

#include "device/host_device.h"

namespace torchrec_pt {

struct PhiloxKey {
  std::uint32_t low;
  std::uint32_t high;
};

struct PhiloxWords {
  std::uint32_t x, y, z, w;

  // Without an array, which a kernel would keep in memory.
  TORCHREC_PT_HOST_DEVICE std::uint32_t at(std::uint32_t i) const {
    const std::uint32_t even = i & 2 ? z : x;
    const std::uint32_t odd = i & 2 ? w : y;
    return i & 1 ? odd : even;
  }
};

TORCHREC_PT_HOST_DEVICE PhiloxWords philox(PhiloxWords counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product_x = std::uint64_t{0xD2511F53} * counter.x;
    const std::uint64_t product_z = std::uint64_t{0xCD9E8D57} * counter.z;
    counter = {static_cast<std::uint32_t>(product_z >> 32) ^ counter.y ^ key.low,
               static_cast<std::uint32_t>(product_z),
               static_cast<std::uint32_t>(product_x >> 32) ^ counter.w ^ key.high,
               static_cast<std::uint32_t>(product_x)};
    key.low += 0x9E3779B9;   // the golden ratio
    key.high += 0xBB67AE85;  // sqrt(3) - 1
  }
  return counter;
}

}  // namespace torchrec_pt
