// Forward of sampled_softmax on the CPU (formula and shapes: sampled_softmax.h).
//
// A thread takes whole rows of the batch. A row's negatives come in blocks that fit into the L1
// cache: dot products, the maximum so far, exponentials, and, while the block is still there, their
// weighted sum. Rows are asked for some time before they are read, so that memory works while we
// calculate. The running maximum begins with the positive's logit, which leaves no case without
// one.
//
// Reads B (M + 1) D values of the table. A row's result depends on that row alone, so that the bits
// are the same for any number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/simd.h"
#include "sampled_softmax/sampled_softmax.h"
#include "sampled_softmax/sampled_softmax_rows.h"

namespace torchrec_pt {
namespace {

constexpr int64_t kBlockBytes = 16 * 1024;  // half of an L1 cache
constexpr int64_t kMostBlockRows = 64;
constexpr int64_t kGroup = 4;   // rows whose dot products are taken together
constexpr int64_t kAhead = 16;  // a row is asked for so many rows before it is read
constexpr int64_t kLineBytes = 64;
constexpr int64_t kValuesPerThread = 65536;  // fewer are not worth waking a thread for

// The rows of a table of `Stored`, as the loops over T want them: contiguous and of that type.
template <typename T, typename Stored>
class Table {
 public:
  explicit Table(const at::Tensor& table)
      : dim(table.size(1)),
        values_(table.const_data_ptr<Stored>()),
        row_stride_(table.stride(0)),
        column_stride_(table.stride(1)) {}

  // GCC takes a function that only prefetches for one that does nothing, and drops its calls.
  TORCHREC_PT_INLINE void prefetch(int64_t id) const {
    const auto* row = reinterpret_cast<const char*>(values_ + id * row_stride_);
    for (int64_t at = 0; at < dim * int64_t{sizeof(Stored)}; at += kLineBytes) {
      __builtin_prefetch(row + at);
    }
  }

  // The row itself, or a copy in the `dim` values of the buffer.
  const T* row(int64_t id, T* buffer) const {
    const Stored* stored = values_ + id * row_stride_;
    if constexpr (std::is_same_v<T, Stored>) {
      if (column_stride_ == 1) return stored;
    }
    if (column_stride_ == 1) {
      for (int64_t i = 0; i < dim; ++i) buffer[i] = static_cast<T>(stored[i]);
    } else {
      for (int64_t i = 0; i < dim; ++i) buffer[i] = static_cast<T>(stored[i * column_stride_]);
    }
    return buffer;
  }

  const int64_t dim;

 private:
  const Stored* values_;
  int64_t row_stride_;
  int64_t column_stride_;
};

// A (B,) or (B, M) tensor of any strides.
template <typename T>
struct Strided {
  explicit Strided(const at::Tensor& tensor)
      : values(tensor.const_data_ptr<T>()),
        row_stride(tensor.stride(0)),
        column_stride(tensor.dim() == 2 ? tensor.stride(1) : 0) {}

  T operator()(int64_t row, int64_t column = 0) const {
    return values[row * row_stride + column * column_stride];
  }

  const T* values;
  int64_t row_stride;
  int64_t column_stride;
};

template <typename T>
struct Outputs {
  T* loss;
  bool with_gradients;
  T* p;
  T* direction;
};

// One thread's visits to the rows of the batch.
template <typename T, typename Stored>
class Visitor {
 public:
  // The problem's query and log_q are of type T, the query contiguous.
  Visitor(const Table<T, Stored>& table, const SampledSoftmaxProblem& problem,
          const Outputs<T>& outputs)
      : table_(table),
        num_negatives_(problem.negatives.size(1)),
        block_rows_(std::clamp<int64_t>(kBlockBytes / (sizeof(T) * std::max<int64_t>(1, table.dim)),
                                        kGroup, kMostBlockRows)),
        inverse_tau_(static_cast<T>(1 / problem.temperature.item<double>())),
        query_(problem.query.const_data_ptr<T>()),
        positive_(problem.positive),
        negatives_(problem.negatives),
        outputs_(outputs),
        copies_((block_rows_ + 1) * table.dim) {
    if (problem.log_q_positive) log_q_positive_.emplace(*problem.log_q_positive);
    if (problem.log_q_negatives) log_q_negatives_.emplace(*problem.log_q_negatives);
  }

  void visit(int64_t begin, int64_t end) {
    end_ = end;
    for (int64_t row = begin; row < end; ++row) {
      start(row);
      for (int64_t first = 0; first < num_negatives_; first += block_rows_) {
        add_block(row, first, std::min(block_rows_, num_negatives_ - first));
      }
      finish(row);
    }
  }

 private:
  const T* query(int64_t row) const { return query_ + row * table_.dim; }
  T* direction(int64_t row) const { return outputs_.direction + row * table_.dim; }
  T* p(int64_t row) const { return outputs_.p + row * num_negatives_; }

  void start(int64_t row) {
    if (row + 1 < end_) table_.prefetch(positive_(row + 1));
    positive_row_ = table_.row(positive_(row), copies_.data() + block_rows_ * table_.dim);
    dots(query(row), &positive_row_, 1, table_.dim, &positive_logit_);
    positive_logit_ *= inverse_tau_;
    if (log_q_positive_) positive_logit_ -= (*log_q_positive_)(row);
    highest_ = positive_logit_;
    sum_ = 0;
    if (outputs_.with_gradients) std::fill_n(direction(row), table_.dim, T(0));
  }

  // Asks for the negatives that are kAhead after these.
  TORCHREC_PT_INLINE void prefetch(int64_t row, int64_t first, int64_t num) const {
    row += (first + kAhead) / num_negatives_;
    int64_t m = (first + kAhead) % num_negatives_;
    for (int64_t i = 0; i < num && row < end_; ++i) {
      table_.prefetch(negatives_(row, m));
      if (++m == num_negatives_) ++row, m = 0;
    }
  }

  // The rows of negatives, from place j of the block on, and what is added to their logits. One
  // that is masked reads the positive's row, so that what its own holds does not matter.
  void gather(int64_t row, int64_t first, int64_t num, int64_t j) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const int64_t positive = positive_(row);
    for (int64_t i = 0; i < num; ++i) {
      const int64_t id = negatives_(row, first + i);
      const T log_q = log_q_negatives_ ? (*log_q_negatives_)(row, first + i) : 0;
      const bool is_masked = id == positive || log_q == kInfinity;
      T* const copy = copies_.data() + (j + i) * table_.dim;
      rows_[j + i] = is_masked ? positive_row_ : table_.row(id, copy);
      shift_[j + i] = is_masked ? -kInfinity : -log_q;
    }
  }

  void add_block(int64_t row, int64_t first, int64_t num) {
    T* s = outputs_.with_gradients ? p(row) + first : logits_;
    for (int64_t j = 0; j < num; j += kGroup) {
      const int64_t size = std::min(kGroup, num - j);
      prefetch(row, first + j, size);
      gather(row, first + j, size, j);
      dots(query(row), rows_ + j, size, table_.dim, s + j);
    }
    const T highest = logits(s, shift_, num, inverse_tau_, highest_);
    if (highest != highest_) rescale(row, std::exp(highest_ - highest));
    highest_ = highest;
    sum_ += exps(s, num, highest, weights_);
    if (outputs_.with_gradients) add_rows(weights_, rows_, num, table_.dim, direction(row));
  }

  void rescale(int64_t row, T factor) {
    sum_ *= factor;
    if (!outputs_.with_gradients) return;
    for (int64_t i = 0; i < table_.dim; ++i) direction(row)[i] *= factor;
  }

  void finish(int64_t row) {
    const T of_positive = std::exp(positive_logit_ - highest_);
    // log(of_positive + sum), exact also where that is close to 1.
    outputs_.loss[row] = (highest_ - positive_logit_) + std::log1p(sum_ + (of_positive - 1));
    if (!outputs_.with_gradients) return;
    const T scale = 1 / (of_positive + sum_);
    scaled_exps(p(row), num_negatives_, highest_, scale);
    for (int64_t i = 0; i < table_.dim; ++i) {
      direction(row)[i] = (direction(row)[i] - sum_ * positive_row_[i]) * scale;
    }
  }

  const Table<T, Stored>& table_;
  const int64_t num_negatives_;
  const int64_t block_rows_;
  const T inverse_tau_;
  const T* query_;
  const Strided<int64_t> positive_;
  const Strided<int64_t> negatives_;
  std::optional<Strided<T>> log_q_positive_;
  std::optional<Strided<T>> log_q_negatives_;
  const Outputs<T> outputs_;

  int64_t end_ = 0;  // of the rows to visit

  // Of the row that is visited.
  const T* positive_row_ = nullptr;
  T positive_logit_ = 0;
  T highest_ = 0;  // of the logits so far
  T sum_ = 0;      // of exp(s_m - highest) over the negatives so far

  // Of the block.
  const T* rows_[kMostBlockRows];
  T shift_[kMostBlockRows];
  T logits_[kMostBlockRows];
  T weights_[kMostBlockRows];
  std::vector<T> copies_;  // of rows that cannot be read where they stand; the positive's is last
};

template <typename T, typename Stored>
void forward(const SampledSoftmaxProblem& problem, const Outputs<T>& outputs) {
  constexpr auto kDtype = c10::CppTypeToScalarType<T>::value;
  const auto to_dtype = [&](const OptionalTensor& log_q) {
    return log_q ? OptionalTensor(log_q->to(kDtype)) : std::nullopt;
  };
  auto typed = problem;
  typed.query = problem.query.to(kDtype).contiguous();
  typed.log_q_positive = to_dtype(problem.log_q_positive);
  typed.log_q_negatives = to_dtype(problem.log_q_negatives);
  const Table<T, Stored> table(problem.table);
  const int64_t values_per_row = (problem.negatives.size(1) + 1) * std::max<int64_t>(1, table.dim);
  const int64_t grain = std::max<int64_t>(1, kValuesPerThread / values_per_row);
  at::parallel_for(0, problem.query.size(0), grain, [&](int64_t begin, int64_t end) {
    Visitor<T, Stored>(table, typed, outputs).visit(begin, end);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sampled_softmax_forward_cpu(
    const at::Tensor& query, const at::Tensor& table, const at::Tensor& positive,
    const at::Tensor& negatives, const at::Tensor& temperature,
    const OptionalTensor& log_q_positive, const OptionalTensor& log_q_negatives,
    bool with_gradients, bool /*sparse*/) {
  const SampledSoftmaxProblem problem{query,       table,          positive,       negatives,
                                      temperature, log_q_positive, log_q_negatives};
  check_sampled_softmax(problem);
  const bool is_double = query.scalar_type() == at::kDouble;
  const auto options = query.options().dtype(is_double ? at::kDouble : at::kFloat);
  const auto loss = at::empty({query.size(0)}, options);
  const auto p = with_gradients ? at::empty(negatives.sizes(), options) : at::empty({0}, options);
  const auto direction =
      with_gradients ? at::empty(query.sizes(), options) : at::empty({0}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, table.scalar_type(), "sampled_softmax_forward", [&] {
        using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        forward<T, scalar_t>(problem, {loss.mutable_data_ptr<T>(), with_gradients,
                                       p.mutable_data_ptr<T>(), direction.mutable_data_ptr<T>()});
      });
  return {loss, p, direction};
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) {
  m.impl("sampled_softmax_forward", &sampled_softmax_forward_cpu);
}

}  // namespace
}  // namespace torchrec_pt
