// Probabilities as integers, and Vose's alias table of them (A linear algorithm for generating
// random numbers with a given distribution, IEEE Transactions on Software Engineering, 1991).
//
// n columns hold 2^32 coins each. The coins of all columns are dealt to the items in proportion to
// their weights; mass_i is how many item i gets, and what is drawn is exactly mass_i / (n 2^32).
// A positive weight gets one coin at least.

#include <ATen/Functions.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "negatives/draw.h"

namespace torchrec_pt {
namespace {

// Draws read a table at random: with small pages most of them would also miss the TLB.
at::Tensor empty_in_large_pages(at::IntArrayRef shape, const at::TensorOptions& options) {
  auto table = at::empty(shape, options);
#ifdef __linux__
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<std::uintptr_t>(table.mutable_data_ptr());
  const auto first = (begin + kPage - 1) / kPage * kPage;
  const auto end = (begin + table.nbytes()) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return table;
}

constexpr int64_t kCoins = int64_t{1} << 32;

void check_weights(const at::Tensor& weights) {
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.scalar_type() == at::kDouble,
                    "negatives: weights must be (n,) float64, got ", weights.scalar_type(), " of ",
                    weights.sizes());
  TORCH_CHECK_VALUE(weights.size(0) >= 1 && weights.size(0) < int64_t{1} << 31,
                    "negatives: there must be 1 to 2^31 - 1 weights, got ", weights.size(0));
}

// Rounds the running sum, so that the rounding errors do not add up.
std::vector<int64_t> deal_coins(const double* weights, int64_t num_items) {
  double sum = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    TORCH_CHECK_VALUE(std::isfinite(weights[i]) && weights[i] >= 0,
                      "negatives: weights must be finite and not negative, got ", weights[i],
                      " for item ", i);
    sum += weights[i];
  }
  TORCH_CHECK_VALUE(sum > 0 && std::isfinite(sum),
                    "negatives: some weight must be positive, and their sum finite; it is ", sum);
  const int64_t total = num_items * kCoins;
  std::vector<int64_t> mass(num_items);
  double sum_so_far = 0;
  int64_t dealt = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    sum_so_far += weights[i];
    const double share = std::min(sum_so_far / sum, 1.0);
    const auto until = static_cast<int64_t>(share * static_cast<double>(total));
    mass[i] = weights[i] > 0 ? std::max<int64_t>(until - dealt, 1) : 0;
    dealt += mass[i];
  }
  // What is over or missing, at most a coin for each item, goes to the one with most.
  *std::max_element(mass.begin(), mass.end()) += total - dealt;
  return mass;
}

void build_columns(std::vector<int64_t> coins, const std::vector<float>& log_q,
                   AliasColumn* columns) {
  const auto num_items = static_cast<int64_t>(coins.size());
  std::vector<std::uint32_t> small, large;
  for (int64_t i = num_items - 1; i >= 0; --i) {
    (coins[i] < kCoins ? small : large).push_back(static_cast<std::uint32_t>(i));
  }
  const auto put = [&](std::uint32_t column, int64_t own, std::uint32_t alias) {
    columns[column] = {static_cast<std::uint32_t>(own), alias, {log_q[column], log_q[alias]}};
  };
  while (!small.empty()) {
    const std::uint32_t column = small.back();
    const std::uint32_t alias = large.back();  // there is one: the coins fill all columns exactly
    small.pop_back();
    put(column, coins[column], alias);
    coins[alias] -= kCoins - coins[column];
    if (coins[alias] < kCoins) {
      large.pop_back();
      small.push_back(alias);
    }
  }
  for (const std::uint32_t column : large) put(column, 0, column);
}

std::tuple<at::Tensor, at::Tensor> alias_table(const at::Tensor& weights) {
  check_weights(weights);
  const auto dense = weights.contiguous();
  const int64_t num_items = dense.size(0);
  auto mass = deal_coins(dense.const_data_ptr<double>(), num_items);
  const double total = static_cast<double>(num_items) * static_cast<double>(kCoins);
  std::vector<float> log_q(num_items);
  std::transform(mass.begin(), mass.end(), log_q.begin(), [&](int64_t coins) {
    return static_cast<float>(std::log(static_cast<double>(coins) / total));
  });
  auto columns = empty_in_large_pages({num_items, 4}, weights.options().dtype(at::kInt));
  auto mass_tensor = empty_in_large_pages({num_items}, weights.options().dtype(at::kLong));
  std::copy(mass.begin(), mass.end(), mass_tensor.mutable_data_ptr<int64_t>());
  build_columns(std::move(mass), log_q,
                reinterpret_cast<AliasColumn*>(columns.mutable_data_ptr<int32_t>()));
  return {columns, mass_tensor};
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) { m.impl("alias_table", &alias_table); }

}  // namespace
}  // namespace torchrec_pt
