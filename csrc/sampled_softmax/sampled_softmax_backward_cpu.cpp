// The table's gradient of sampled_softmax on the CPU (formula and shapes: sampled_softmax.h).
//
// The B (M + 1) pairs of an item and a row of the batch are sorted by item, 8 bytes each; then each
// item's row is the sum of coefficient q_b over its pairs, in the order of the batch. A thread
// takes a range of the sorted pairs and every item whose first pair lies there: the bits are the
// same for any number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "sampled_softmax/sampled_softmax.h"
#include "sampled_softmax/sampled_softmax_pairs.h"
#include "sampled_softmax/sampled_softmax_rows.h"

namespace torchrec_pt {
namespace {

constexpr int64_t kBlockPairs = 64;
constexpr int64_t kPairsPerThread = 4096;

// The pairs, sorted by item.
class SortedPairs {
 public:
  explicit SortedPairs(const SampledSoftmaxUpstream& upstream)
      : size(upstream.negatives.size(0) * (upstream.negatives.size(1) + 1)) {
    constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
    TORCH_CHECK_VALUE(size <= kMost && upstream.num_items <= kMost,
                      "sampled_softmax: V and B (M + 1) may be at most ", kMost, ", got ",
                      upstream.num_items, " and ", size);
    pairs_ = std::make_unique_for_overwrite<Pair[]>(size);
    const int64_t width = upstream.negatives.size(1) + 1;
    const int64_t grain = std::max<int64_t>(1, kPairsPerThread / width);
    const auto positive = upstream.positive.accessor<int64_t, 1>();
    const auto negatives = upstream.negatives.accessor<int64_t, 2>();
    at::parallel_for(0, upstream.positive.size(0), grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t j = 0; j < width; ++j) {
          const int64_t number = row * width + j;
          const int64_t id = j == 0 ? positive[row] : negatives[row][j - 1];
          pairs_[number] = {static_cast<uint32_t>(number), static_cast<uint32_t>(id)};
        }
      }
    });
    sort_by_id(pairs_, size, upstream.num_items);
  }

  const Pair& operator[](int64_t i) const { return pairs_[i]; }
  bool is_first_of_item(int64_t i) const { return i == 0 || pairs_[i].id != pairs_[i - 1].id; }

  // The first pair of an item from the i-th on.
  int64_t next_item(int64_t i) const {
    while (i < size && !is_first_of_item(i)) ++i;
    return i;
  }

  const int64_t size;

 private:
  std::unique_ptr<Pair[]> pairs_;
};

// Whole items, one range to a thread; the items of the sparse gradient are counted from 0.
struct ItemRange {
  int64_t begin;
  int64_t end;
  int64_t num_items_before;
};

struct ItemRanges {
  std::vector<ItemRange> ranges;
  int64_t num_items;
};

template <typename Visit>
void for_each_range(std::vector<ItemRange>& ranges, const Visit& visit) {
  at::parallel_for(0, std::ssize(ranges), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) visit(ranges[i]);
  });
}

ItemRanges ranges_of(const SortedPairs& pairs) {
  const int64_t num_ranges =
      std::clamp<int64_t>(pairs.size / kPairsPerThread, 1, at::get_num_threads());
  std::vector<ItemRange> ranges;
  for (int64_t i = 0; i < num_ranges; ++i) {
    ranges.push_back({pairs.next_item(pairs.size * i / num_ranges),
                      pairs.next_item(pairs.size * (i + 1) / num_ranges), 0});
  }
  for_each_range(ranges, [&](ItemRange& range) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      range.num_items_before += pairs.is_first_of_item(i);
    }
  });
  int64_t num_items = 0;
  for (auto& range : ranges) num_items += std::exchange(range.num_items_before, num_items);
  return {std::move(ranges), num_items};
}

// Each pair's share of its item's gradient: coefficient query.
template <typename T>
class Shares {
 public:
  explicit Shares(const SampledSoftmaxUpstream& upstream)
      : dim(upstream.query.size(1)),
        width_(static_cast<uint32_t>(upstream.negatives.size(1) + 1)),
        tensors_{(upstream.grad_loss / upstream.temperature).to(kDtype).contiguous(),
                 at::expm1(-upstream.loss), upstream.p.contiguous(),
                 upstream.query.to(kDtype).contiguous(), at::zeros({dim}, upstream.loss.options())},
        scale_(tensors_[0].const_data_ptr<T>()),
        minus_sum_of_p_(tensors_[1].const_data_ptr<T>()),
        p_(tensors_[2].const_data_ptr<T>()),
        query_(tensors_[3].const_data_ptr<T>()),
        zeros_(tensors_[4].const_data_ptr<T>()) {}

  // A row without upstream has no share, even where it holds NaN.
  void get(const Pair& pair, T& coefficient, const T*& query) const {
    const uint32_t row = pair.number / width_;
    const uint32_t j = pair.number % width_;
    const T ds = j == 0 ? minus_sum_of_p_[row] : p_[pair.number - row - 1];
    const bool is_live = scale_[row] != 0;
    coefficient = is_live ? scale_[row] * ds : 0;
    query = is_live ? query_ + row * dim : zeros_;
  }

  const int64_t dim;

 private:
  static constexpr auto kDtype = c10::CppTypeToScalarType<T>::value;

  uint32_t width_;
  at::Tensor tensors_[5];
  const T* scale_;           // (B,) g / tau
  const T* minus_sum_of_p_;  // (B,)
  const T* p_;               // (B, M)
  const T* query_;           // (B, D)
  const T* zeros_;           // (D,)
};

// Calls write(id, row) for each item of a range, in order.
template <typename T, typename Write>
void for_each_item(const SortedPairs& pairs, const ItemRange& range, const Shares<T>& shares,
                   const Write& write) {
  T coefficients[kBlockPairs];
  const T* queries[kBlockPairs];
  std::vector<T> sum(shares.dim);
  for (int64_t first = range.begin; first < range.end; first += kBlockPairs) {
    const int64_t num = std::min(kBlockPairs, range.end - first);
    for (int64_t i = 0; i < num; ++i) shares.get(pairs[first + i], coefficients[i], queries[i]);
    for (int64_t i = 0, next; i < num; i = next) {
      const uint32_t id = pairs[first + i].id;
      next = i + 1;
      while (next < num && pairs[first + next].id == id) ++next;
      if (pairs.is_first_of_item(first + i)) std::fill(sum.begin(), sum.end(), T(0));
      add_rows(coefficients + i, queries + i, next - i, shares.dim, sum.data());
      if (first + next == range.end || pairs.is_first_of_item(first + next)) write(id, sum);
    }
  }
}

template <typename T, typename Stored>
void store(const std::vector<T>& sum, Stored* row) {
  for (const T value : sum) *row++ = static_cast<Stored>(value);
}

template <typename T, typename Stored>
void write_sparse(const SampledSoftmaxUpstream& upstream, const SortedPairs& pairs,
                  ItemRanges& items, const at::Tensor& ids, const at::Tensor& rows) {
  const Shares<T> shares(upstream);
  for_each_range(items.ranges, [&](const ItemRange& range) {
    int64_t* id_at = ids.mutable_data_ptr<int64_t>() + range.num_items_before;
    Stored* row_at = rows.mutable_data_ptr<Stored>() + range.num_items_before * shares.dim;
    for_each_item(pairs, range, shares, [&](int64_t id, const std::vector<T>& sum) {
      *id_at++ = id;
      store(sum, row_at);
      row_at += shares.dim;
    });
  });
}

template <typename T, typename Stored>
void write_dense(const SampledSoftmaxUpstream& upstream, const SortedPairs& pairs,
                 ItemRanges& items, const at::Tensor& grad) {
  const Shares<T> shares(upstream);
  for_each_range(items.ranges, [&](const ItemRange& range) {
    for_each_item(pairs, range, shares, [&](int64_t id, const std::vector<T>& sum) {
      store(sum, grad.mutable_data_ptr<Stored>() + id * shares.dim);
    });
  });
}

// Calls run<T, Stored>() for the type of the computation and that of the table.
template <typename Run>
void dispatch(at::ScalarType dtype, const Run& run) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "sampled_softmax_backward", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run.template operator()<T, scalar_t>();
  });
}

std::tuple<at::Tensor, at::Tensor> sampled_softmax_backward_sparse_cpu(
    const at::Tensor& grad_loss, const at::Tensor& loss, const at::Tensor& p,
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& negatives,
    const at::Tensor& temperature, int64_t num_items, at::ScalarType dtype) {
  const SampledSoftmaxUpstream upstream{grad_loss, loss,      p,           query,
                                        positive,  negatives, temperature, num_items};
  check_sampled_softmax(upstream);
  const SortedPairs pairs(upstream);
  auto items = ranges_of(pairs);
  const auto ids = at::empty({items.num_items}, positive.options());
  const auto rows = at::empty({items.num_items, query.size(1)}, query.options().dtype(dtype));
  dispatch(dtype, [&]<typename T, typename Stored> {
    write_sparse<T, Stored>(upstream, pairs, items, ids, rows);
  });
  return {ids, rows};
}

at::Tensor sampled_softmax_backward_dense_cpu(const at::Tensor& grad_loss, const at::Tensor& loss,
                                              const at::Tensor& p, const at::Tensor& query,
                                              const at::Tensor& positive,
                                              const at::Tensor& negatives,
                                              const at::Tensor& temperature, int64_t num_items,
                                              at::ScalarType dtype) {
  const SampledSoftmaxUpstream upstream{grad_loss, loss,      p,           query,
                                        positive,  negatives, temperature, num_items};
  check_sampled_softmax(upstream);
  const SortedPairs pairs(upstream);
  auto items = ranges_of(pairs);
  const auto grad = at::zeros({num_items, query.size(1)}, query.options().dtype(dtype));
  dispatch(dtype, [&]<typename T, typename Stored> {
    write_dense<T, Stored>(upstream, pairs, items, grad);
  });
  return grad;
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) {
  m.impl("sampled_softmax_backward_sparse", &sampled_softmax_backward_sparse_cpu);
  m.impl("sampled_softmax_backward_dense", &sampled_softmax_backward_dense_cpu);
}

}  // namespace
}  // namespace torchrec_pt
