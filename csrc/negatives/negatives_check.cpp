// What every device asks of the inputs of negatives. That a row's excluded items ascend, are items,
// and leave some other is checked where they are read.

#include <c10/util/Exception.h>

#include "negatives/negatives.h"

namespace torchrec_pt {
namespace {

constexpr int64_t kMostItems = (int64_t{1} << 31) - 1;
constexpr int64_t kMostDraws = int64_t{1} << 32;

void check_word(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 0 && value < int64_t{1} << 32, "negatives: ", name,
                    " must be in [0, 2^32), got ", value);
}

void check_tensor(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape,
                  at::ScalarType dtype, const NegativesProblem& problem) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->sizes() == shape && tensor->scalar_type() == dtype, "negatives: ", name,
                    " must be ", dtype, " of shape ", shape, ", got ", tensor->scalar_type(),
                    " of ", tensor->sizes());
  TORCH_CHECK_VALUE(tensor->device() == problem.rows.device(), "negatives: ", name, " is on ",
                    tensor->device(), " but rows is on ", problem.rows.device());
  TORCH_CHECK_VALUE(tensor->is_contiguous(), "negatives: ", name, " must be contiguous");
}

}  // namespace

void check_negatives(const NegativesProblem& problem) {
  const auto& [rows, num_draws, num_items, seed, step, columns, mass, exclude, exclude_offsets] =
      problem;
  TORCH_CHECK_VALUE(rows.dim() == 1, "negatives: rows must be (R,), got ", rows.sizes());
  TORCH_CHECK_VALUE(num_items >= 1 && num_items <= kMostItems,
                    "negatives: num_items must be in [1, 2^31), got ", num_items);
  TORCH_CHECK_VALUE(num_draws >= 0 && num_draws < kMostDraws,
                    "negatives: the draws of a row must be in [0, 2^32), got ", num_draws);
  check_word("seed", seed);
  check_word("step", step);
  check_tensor("rows", rows, {rows.size(0)}, at::kLong, problem);
  check_tensor("columns", columns, {num_items, 4}, at::kInt, problem);
  check_tensor("mass", mass, {num_items}, at::kLong, problem);
  TORCH_CHECK_VALUE(columns.has_value() == mass.has_value(),
                    "negatives: columns and mass go together");
  TORCH_CHECK_VALUE(exclude.has_value() == exclude_offsets.has_value(),
                    "negatives: exclude and exclude_offsets go together");
  if (exclude) {
    check_tensor("exclude", exclude, {exclude->numel()}, at::kLong, problem);
    check_tensor("exclude_offsets", exclude_offsets, {rows.size(0) + 1}, at::kLong, problem);
  }
}

void check_philox(const at::Tensor& counters, const at::Tensor& key) {
  TORCH_CHECK_VALUE(counters.dim() == 2 && counters.size(1) == 4 && key.dim() == 1 &&
                        key.size(0) == 2 && counters.scalar_type() == at::kLong &&
                        key.scalar_type() == at::kLong && counters.device() == key.device(),
                    "philox: counters must be (N, 4) and key (2,), int64 on one device, got ",
                    counters.sizes(), " and ", key.sizes());
}

}  // namespace torchrec_pt
