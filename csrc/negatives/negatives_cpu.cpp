// negatives on the CPU (formula and shapes: negatives.h).
//
// A row is drawn by one thread, kChunk draws at a time: the words of all, their columns, then the
// items. The alias columns are fetched ahead, since each is a miss of the cache. Most items pass
// the row's exclusions by one look into a bitmap of their hashes; the others are searched for.

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <tuple>
#include <vector>

#include "negatives/negatives.h"
#include "negatives/negatives_words.h"

namespace torchrec_pt {
namespace {

constexpr std::int64_t kChunk = 256;

using Words = std::array<std::uint32_t, kChunk>;

// The items that a row must not be given: ascending, with a bitmap of their hashes that lets nearly
// every other item pass.
class Excluded {
 public:
  // Takes the place of the items before.
  void assign(const Exclusions& exclusions) {
    exclusions_ = exclusions;
    const auto [items, size, mass_left] = exclusions;
    const auto width = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(size)));
    const int log2_bits = std::min(width + 6, 24);
    shift_ = 32 - log2_bits;
    bits_.assign(std::size_t{1} << (log2_bits - 5), 0);
    for (std::int64_t i = 0; i < size; ++i) {
      const std::uint32_t bit = hash_bit(static_cast<std::uint32_t>(items[i]), shift_);
      bits_[bit / 32] |= std::uint32_t{1} << bit % 32;
    }
  }

  bool operator()(std::uint32_t item) const {
    const std::uint32_t bit = hash_bit(item, shift_);
    return (bits_[bit / 32] >> bit % 32 & 1) != 0 && exclusions_.contains(item);
  }

  bool is_empty() const { return exclusions_.size == 0; }
  const Exclusions& exclusions() const { return exclusions_; }
  const std::uint32_t* bits() const { return bits_.data(); }
  int shift() const { return shift_; }

 private:
  Exclusions exclusions_{};
  int shift_ = 31;
  std::vector<std::uint32_t> bits_{0};  // of nothing
};

class Sampler {
 public:
  Sampler(const NegativesProblem& problem, at::Tensor& items, at::Tensor& log_q)
      : distribution_(distribution_of(problem)),
        key_(key_of(problem)),
        num_rows_(problem.rows.size(0)),
        num_draws_(problem.num_draws),
        total_mass_(total_mass(problem)),
        rows_(problem.rows.const_data_ptr<int64_t>()),
        exclude_(data_or_null<int64_t>(problem.exclude)),
        offsets_(data_or_null<int64_t>(problem.exclude_offsets)),
        num_excluded_(problem.exclude ? problem.exclude->numel() : 0),
        items_(items.mutable_data_ptr<int64_t>()),
        log_q_(log_q.mutable_data_ptr<float>()) {}

  void sample_row(std::int64_t r, Excluded& excluded) const {
    TORCH_CHECK_VALUE(rows_[r] >= 0 && rows_[r] < std::int64_t{1} << 32,
                      "negatives: rows must be in [0, 2^32), got ", rows_[r], " at ", r);
    const float log_scale = exclude_row(r, excluded);
    if (!distribution_.columns) log_q_[r] = log_scale;
    for (std::int64_t first = 0; first < num_draws_; first += kChunk) {
      const std::int64_t size = std::min(kChunk, num_draws_ - first);
      draw(r, first, size, log_scale, excluded);
    }
  }

 private:
  // The log of M / (1 - sum of the excluded items' q); over n where the distribution is uniform.
  float exclude_row(std::int64_t r, Excluded& excluded) const {
    std::uint64_t mass = total_mass_;
    Exclusions exclusions{exclude_, 0, 0};
    if (offsets_) {
      const std::int64_t begin = offsets_[r];
      const std::int64_t end = offsets_[r + 1];
      TORCH_CHECK_VALUE(0 <= begin && begin <= end && end <= num_excluded_,
                        "negatives: exclude's offsets must ascend from 0 to ", num_excluded_,
                        ", got ", begin, " and ", end, " for row ", r);
      fetch_masses(r + 1);
      for (std::int64_t i = begin; i < end; ++i) mass -= mass_of(exclude_[i], i, begin, r);
      TORCH_CHECK_VALUE(mass > 0, "negatives: row ", r, " excludes all ", distribution_.num_items,
                        " items that can be drawn; leave the row out, or some of its items in");
      exclusions.items += begin;
      exclusions.size = end - begin;
    }
    exclusions.mass_left = mass;
    excluded.assign(exclusions);
    const double total = static_cast<double>(distribution_.columns ? total_mass_ : 1);
    const double draws = static_cast<double>(num_draws_);
    return static_cast<float>(std::log(draws * total / static_cast<double>(mass)));
  }

  // Ahead of the row's turn.
  void fetch_masses(std::int64_t r) const {
    if (!distribution_.mass || r >= num_rows_) return;
    const std::int64_t end = std::min(offsets_[r + 1], num_excluded_);
    for (std::int64_t i = std::max<std::int64_t>(offsets_[r], 0); i < end; ++i) {
      __builtin_prefetch(distribution_.mass + exclude_[i]);
    }
  }

  std::uint64_t mass_of(std::int64_t item, std::int64_t i, std::int64_t begin,
                        std::int64_t r) const {
    TORCH_CHECK_VALUE(item >= 0 && item < distribution_.num_items, "negatives: row ", r,
                      " excludes item ", item, ", but items are 0 to ",
                      distribution_.num_items - 1);
    TORCH_CHECK_VALUE(i == begin || exclude_[i - 1] < item, "negatives: the items that row ", r,
                      " excludes must ascend, got ", item, " after ", exclude_[i - 1],
                      "; Jagged.to_sets() sorts them");
    return distribution_.mass ? static_cast<std::uint64_t>(distribution_.mass[item]) : 1;
  }

  DrawPlace place(std::int64_t r, std::int64_t draw) const {
    return {key_, static_cast<std::uint32_t>(rows_[r]), static_cast<std::uint32_t>(draw)};
  }

  Words words(std::int64_t r, std::int64_t first, std::int64_t size, DrawStream stream) const {
    Words words;
    first_words(key_, static_cast<std::uint32_t>(rows_[r]), stream,
                static_cast<std::uint32_t>(first),
                (size + kWordGroup - 1) / kWordGroup * kWordGroup, words.data());
    return words;
  }

  void draw(std::int64_t r, std::int64_t first, std::int64_t size, float log_scale,
            const Excluded& excluded) const {
    std::int64_t* items = items_ + r * num_draws_ + first;
    float* log_q = distribution_.columns ? log_q_ + r * num_draws_ + first : nullptr;
    const Words column_words = words(r, first, size, kColumn);
    const bool any_refused = to_columns(distribution_, column_words.data(), size, items);
    if (distribution_.columns) {
      const Words coins = words(r, first, size, kCoin);
      to_items(distribution_, coins.data(), size, log_scale, items, log_q);
    }
    if (!any_refused && excluded.is_empty()) return;
    for (std::int64_t begin = 0; begin < size; begin += kSuspects) {
      const std::int64_t end = std::min(begin + kSuspects, size);
      const bool is_whole = end - begin == kSuspects;
      if (is_whole && !any_suspect(distribution_, column_words.data() + begin, items + begin,
                                   excluded.bits(), excluded.shift())) {
        continue;
      }
      for (std::int64_t d = begin; d < end; ++d) {
        const bool is_refused = distribution_.refuses(distribution_.product(column_words[d]));
        if (!is_refused && !excluded(static_cast<std::uint32_t>(items[d]))) continue;
        const Drawn drawn = draw_again(distribution_, place(r, first + d), excluded.exclusions());
        items[d] = drawn.item;
        if (log_q) log_q[d] = drawn.log_q + log_scale;
      }
    }
  }

  ItemDistribution distribution_;
  PhiloxKey key_;
  std::int64_t num_rows_;
  std::int64_t num_draws_;
  std::uint64_t total_mass_;
  const std::int64_t* rows_;
  const std::int64_t* exclude_;  // null, like offsets_: nothing
  const std::int64_t* offsets_;
  std::int64_t num_excluded_;
  std::int64_t* items_;
  float* log_q_;
};

std::tuple<at::Tensor, at::Tensor> sample_negatives_cpu(const at::Tensor& rows, int64_t num_draws,
                                                        int64_t num_items, int64_t seed,
                                                        int64_t step, const OptionalTensor& columns,
                                                        const OptionalTensor& mass,
                                                        const OptionalTensor& exclude,
                                                        const OptionalTensor& exclude_offsets) {
  const NegativesProblem problem{rows.contiguous(), num_draws, num_items, seed,           step,
                                 columns,           mass,      exclude,   exclude_offsets};
  check_negatives(problem);
  auto items = at::empty({rows.size(0), num_draws}, rows.options());
  auto log_q = empty_log_q(problem);
  const Sampler sampler(problem, items, log_q);
  const std::int64_t rows_per_task =
      std::max<std::int64_t>(1, 4096 / std::max<int64_t>(num_draws, 1));
  at::parallel_for(0, rows.size(0), rows_per_task, [&](std::int64_t begin, std::int64_t end) {
    Excluded excluded;
    for (std::int64_t r = begin; r < end; ++r) sampler.sample_row(r, excluded);
  });
  return {items, log_q};
}

at::Tensor philox_cpu(const at::Tensor& counters, const at::Tensor& key) {
  check_philox(counters, key);
  const auto in = counters.contiguous();
  const auto key_words = key.contiguous();
  const auto* words = in.const_data_ptr<int64_t>();
  const auto* key_data = key_words.const_data_ptr<int64_t>();
  auto out = at::empty_like(in);
  auto* result = out.mutable_data_ptr<int64_t>();
  const auto word = [](std::int64_t value) { return static_cast<std::uint32_t>(value); };
  for (std::int64_t i = 0; i < in.size(0); ++i, words += 4, result += 4) {
    const PhiloxWords block =
        philox({word(words[0]), word(words[1]), word(words[2]), word(words[3])},
               {word(key_data[0]), word(key_data[1])});
    for (std::uint32_t j = 0; j < 4; ++j) result[j] = block.at(j);
  }
  return out;
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) {
  m.impl("philox", &philox_cpu);
  m.impl("sample_negatives", &sample_negatives_cpu);
}

}  // namespace
}  // namespace torchrec_pt
