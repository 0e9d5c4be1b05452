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
// A refused column and an excluded item are drawn again with the next retry. After kTries the item
// is found by its share of what is left: with w the column's word of retry kTries, the one in whose
// part of the mass left lies floor(w mass / 2^32), counted up over the items that are not excluded.

#pragma once

#include <cstdint>

#include "negatives/philox.h"

namespace torchrec_pt {

constexpr std::uint32_t kTries = 1024;

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
  const std::int64_t* mass;    // (num_items,) coins of each item; null, as columns is: one each
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

// The items that a row is not given.
struct Exclusions {
  const std::int64_t* items;  // (size,) ascending
  std::int64_t size;
  std::uint64_t mass_left;  // of all others

  TORCHREC_PT_HOST_DEVICE bool contains(std::int64_t item) const {
    const std::int64_t i = first([&](std::int64_t i) { return items[i] >= item; });
    return i < size && items[i] == item;
  }

  // The k-th of the items that are not excluded, from 0.
  TORCHREC_PT_HOST_DEVICE std::int64_t other(std::int64_t k) const {
    return k + first([&](std::int64_t i) { return items[i] - i > k; });
  }

 private:
  // The least i of [0, size] from which on the condition holds.
  template <typename Condition>
  TORCHREC_PT_HOST_DEVICE std::int64_t first(const Condition& holds) const {
    std::int64_t begin = 0;
    std::int64_t end = size;
    while (begin < end) {
      const std::int64_t middle = (begin + end) / 2;
      const bool does = holds(middle);
      begin = does ? begin : middle + 1;
      end = does ? middle : end;
    }
    return begin;
  }
};

// The draw when all tries were refused: exact, but in steps as many as there are items.
TORCHREC_PT_HOST_DEVICE Drawn draw_by_mass(const ItemDistribution& distribution,
                                           const DrawPlace& place, const Exclusions& excluded) {
  const std::uint64_t word = place.word(kTries, kColumn);
  const std::uint64_t low = excluded.mass_left & 0xffffffff;
  std::uint64_t left = (excluded.mass_left >> 32) * word + (low * word >> 32);
  if (!distribution.columns) {
    return {static_cast<std::uint32_t>(excluded.other(static_cast<std::int64_t>(left))), 0};
  }
  std::int64_t next_excluded = 0;
  for (std::uint32_t item = 0;; ++item) {
    if (next_excluded < excluded.size && excluded.items[next_excluded] == item) {
      ++next_excluded;
      continue;
    }
    const auto mass = static_cast<std::uint64_t>(distribution.mass[item]);
    if (left < mass) return {item, distribution.columns[item].log_q[0]};
    left -= mass;
  }
}

// The draw once its first try was refused. Some item that is not excluded must be possible.
TORCHREC_PT_HOST_DEVICE Drawn draw_again(const ItemDistribution& distribution,
                                         const DrawPlace& place, const Exclusions& excluded) {
  for (std::uint32_t retry = 1; retry < kTries; ++retry) {
    const std::uint64_t product = distribution.product(place.word(retry, kColumn));
    if (distribution.refuses(product)) continue;
    const std::uint32_t coin = distribution.columns ? place.word(retry, kCoin) : 0;
    const Drawn drawn = distribution.item(static_cast<std::uint32_t>(product >> 32), coin);
    if (!excluded.contains(drawn.item)) return drawn;
  }
  return draw_by_mass(distribution, place, excluded);
}

}  // namespace torchrec_pt
