// The vectorized loops of negatives on the CPU.

#pragma once

#include <cstdint>

#include "negatives/draw.h"

namespace torchrec_pt {

constexpr std::int64_t kWordGroup = 64;  // made at a time

// words[d] = the first try's word of draw first_draw + d, for d < num_words; both are multiples of
// kWordGroup.
void first_words(PhiloxKey key, std::uint32_t row, DrawStream stream, std::uint32_t first_draw,
                 std::int64_t num_words, std::uint32_t* words);

// Each word's column; whether any of them is refused.
bool to_columns(const ItemDistribution& distribution, const std::uint32_t* words,
                std::int64_t num_words, std::int64_t* columns);

// items holds columns and becomes the items; log_q = log_scale + log q. Not for uniform.
void to_items(const ItemDistribution& distribution, const std::uint32_t* coins, std::int64_t size,
              float log_scale, std::int64_t* items, float* log_q);

// Where an item stands in a bitmap of 2^(32 - shift) bits.
TORCHREC_PT_HOST_DEVICE std::uint32_t hash_bit(std::uint32_t item, int shift) {
  return item * 0x9E3779B1u >> shift;
}

// Whether, of so many draws, a word's column is refused or an item may be in the bitmap.
constexpr std::int64_t kSuspects = 16;
bool any_suspect(const ItemDistribution& distribution, const std::uint32_t* words,
                 const std::int64_t* items, const std::uint32_t* bits, int shift);

}  // namespace torchrec_pt
