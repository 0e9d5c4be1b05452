// How a random word becomes an item: shared by the CPU and the kernels, so that ids are the same.
//
// Draw d of a row takes word d mod 4 of two blocks of Philox: one names a column, one is a coin.
//
//   key      (seed, step)
//   counter  (row, d / 4, retry, kColumn or kCoin)
//
// column = floor(word n / 2^32), refused where the low half of the product is below 2^32 mod n, so
// that all columns are equally likely (Lemire 2019). Uniform: the column is the item. Otherwise an
// alias table (Vose 1991): the column itself where the coin is below its threshold, else its alias.
// A refused column and an excluded item are drawn again with the next retry; after kTries the draw
// goes up from its last column to the first item that may come out.

#pragma once

#include <cstdint>
#include <limits>

#include "negatives/philox.h"

namespace torchrec_pt {

constexpr std::uint32_t kTries = 128;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum DrawStream : std::uint32_t { kColumn, kCoin };

// The column's own item has its number.
struct alignas(16) AliasColumn {
  std::uint32_t coins_of_own;
  std::uint32_t alias;
  float log_q[2];  // the log of the probability of its own item, and of the alias
};

struct Drawn {
  std::uint32_t item;
  float log_q;  // 0 where the distribution is uniform
};

struct ItemDistribution {
  const AliasColumn* columns;  // (num_items,); null: uniform
  std::uint32_t num_items;     // below 2^31
  std::uint32_t remainder;     // 2^32 mod num_items

  TORCHREC_PT_HOST_DEVICE std::uint64_t product(std::uint32_t word) const {
    return std::uint64_t{word} * num_items;
  }
  TORCHREC_PT_HOST_DEVICE bool refuses(std::uint64_t product) const {
    return static_cast<std::uint32_t>(product) < remainder;
  }
  TORCHREC_PT_HOST_DEVICE Drawn item(std::uint32_t column, std::uint32_t coin) const {
    if (!columns) return {column, 0};
    // Without a branch, which nothing could predict.
    const AliasColumn& at = columns[column];
    const std::uint32_t is_alias = coin >= at.coins_of_own;
    return {column ^ ((column ^ at.alias) & -is_alias), at.log_q[is_alias]};
  }
};

// Where draw `draw` of global row `row` finds its words.
struct DrawPlace {
  PhiloxKey key;
  std::uint32_t row;
  std::uint32_t draw;

  TORCHREC_PT_HOST_DEVICE std::uint32_t word(std::uint32_t retry, DrawStream stream) const {
    return philox({row, draw / 4, retry, stream}, key).at(draw % 4);
  }
};

// Whether an ascending set holds the item.
TORCHREC_PT_HOST_DEVICE bool contains(const std::int64_t* set, std::int64_t size,
                                      std::int64_t item) {
  const std::int64_t* const end = set + size;
  while (size > 0) {
    const std::int64_t half = size / 2;
    const bool is_above = set[half] < item;
    set += is_above ? half + 1 : 0;
    size = is_above ? size - half - 1 : half;
  }
  return set != end && *set == item;
}

// The draw once its first try was refused. Some item that is not excluded must be possible.
template <typename IsExcluded>
TORCHREC_PT_HOST_DEVICE Drawn draw_again(const ItemDistribution& distribution,
                                         const DrawPlace& place, const IsExcluded& is_excluded) {
  std::uint32_t column = 0;
  for (std::uint32_t retry = 1; retry < kTries; ++retry) {
    const std::uint64_t product = distribution.product(place.word(retry, kColumn));
    column = static_cast<std::uint32_t>(product >> 32);
    if (distribution.refuses(product)) continue;
    const std::uint32_t coin = distribution.columns ? place.word(retry, kCoin) : 0;
    const Drawn drawn = distribution.item(column, coin);
    if (!is_excluded(drawn.item)) return drawn;
  }
  for (;; column = column + 1 < distribution.num_items ? column + 1 : 0) {
    const float log_q = distribution.columns ? distribution.columns[column].log_q[0] : 0;
    if (log_q != -kInfinity && !is_excluded(column)) return {column, log_q};
  }
}

}  // namespace torchrec_pt
