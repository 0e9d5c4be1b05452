// See sampled_softmax_pairs.h: a radix sort from the lowest digit up, whose threads each count and
// then move a part of the pairs.

#include "sampled_softmax/sampled_softmax_pairs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

namespace torchrec_pt {
namespace {

constexpr int kMostDigitBits = 11;  // so many buckets are written to at once from an L1 cache
constexpr int64_t kPairsPerThread = 16384;

struct Digit {
  int shift;
  int num_bits;

  int64_t num_buckets() const { return int64_t{1} << num_bits; }
  uint32_t operator()(const Pair& pair) const {
    return pair.id >> shift & static_cast<uint32_t>(num_buckets() - 1);
  }
};

// counts (parts, buckets) become where each part's pairs of a bucket begin.
void to_starts(std::vector<int64_t>& counts, int64_t num_parts, int64_t num_buckets) {
  int64_t start = 0;
  for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
    for (int64_t part = 0; part < num_parts; ++part) {
      start += std::exchange(counts[part * num_buckets + bucket], start);
    }
  }
}

void move_by_digit(const Pair* from, Pair* to, int64_t size, Digit digit) {
  const int64_t num_parts = std::clamp<int64_t>(size / kPairsPerThread, 1, at::get_num_threads());
  std::vector<int64_t> places(num_parts * digit.num_buckets());
  const auto for_each_part = [&](const auto& visit) {
    at::parallel_for(0, num_parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t end = size * (part + 1) / num_parts;
        int64_t* const places_of_part = places.data() + part * digit.num_buckets();
        for (int64_t i = size * part / num_parts; i < end; ++i) visit(from[i], places_of_part);
      }
    });
  };
  for_each_part([&](const Pair& pair, int64_t* counts) { ++counts[digit(pair)]; });
  to_starts(places, num_parts, digit.num_buckets());
  for_each_part([&](const Pair& pair, int64_t* starts) { to[starts[digit(pair)]++] = pair; });
}

}  // namespace

void sort_by_id(std::unique_ptr<Pair[]>& pairs, int64_t size, int64_t num_ids) {
  const int num_bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(num_ids, 1) - 1));
  const int num_digits = (num_bits + kMostDigitBits - 1) / kMostDigitBits;
  auto moved = std::make_unique_for_overwrite<Pair[]>(size);
  for (int shift = 0, left = num_digits; left > 0; --left) {
    const Digit digit{shift, (num_bits - shift + left - 1) / left};
    move_by_digit(pairs.get(), moved.get(), size, digit);
    std::swap(pairs, moved);
    shift += digit.num_bits;
  }
}

}  // namespace torchrec_pt
