// What every device asks of the inputs of sampled_softmax.

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "sampled_softmax/sampled_softmax.h"

namespace torchrec_pt {
namespace {

void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "sampled_softmax: ", name, " must have shape ", shape,
                    ", got ", tensor.sizes());
}

void check_device(const char* name, const at::Tensor& tensor, const at::Tensor& query) {
  TORCH_CHECK_VALUE(tensor.device() == query.device(), "sampled_softmax: ", name, " is on ",
                    tensor.device(), " but query is on ", query.device());
}

// A device finds ids that are no row while it gathers.
void check_ids(const char* name, const at::Tensor& ids, int64_t num_items,
               const at::Tensor& query) {
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong, "sampled_softmax: ", name,
                    " must be int64, got ", ids.scalar_type());
  check_device(name, ids, query);
  if (!ids.device().is_cpu() || ids.numel() == 0) return;
  const auto [lowest, highest] = at::aminmax(ids);
  const int64_t low = lowest.item<int64_t>();
  const int64_t high = highest.item<int64_t>();
  TORCH_CHECK_VALUE(low >= 0 && high < num_items, "sampled_softmax: ", name,
                    " must be in [0, V) with V = ", num_items, ", got ", low < 0 ? low : high);
}

void check_log_q(const char* name, const OptionalTensor& log_q, const at::Tensor& ids) {
  if (!log_q) return;
  check_shape(name, *log_q, ids.sizes());
  TORCH_CHECK_VALUE(log_q->is_floating_point(), "sampled_softmax: ", name,
                    " must be floating point, got ", log_q->scalar_type());
  check_device(name, *log_q, ids);
}

void check_temperature(const at::Tensor& temperature) {
  TORCH_CHECK_VALUE(temperature.dim() == 0 && temperature.is_floating_point(),
                    "sampled_softmax: temperature must be a float or a 0-dim floating point "
                    "tensor, got ",
                    temperature.scalar_type(), " of shape ", temperature.sizes());
  if (!temperature.device().is_cpu()) return;
  TORCH_CHECK_VALUE(temperature.item<double>() > 0,
                    "sampled_softmax: temperature must be positive, got ",
                    temperature.item<double>());
}

// What negatives of each row and negatives of all rows share.
void check_common(const SampledSoftmaxProblem& problem) {
  const auto& [query, table, positive, negatives, temperature, log_q_positive, log_q_negatives] =
      problem;
  TORCH_CHECK_VALUE(query.dim() == 2 && table.dim() == 2 && query.size(1) == table.size(1),
                    "sampled_softmax: query must be (B, D) and table (V, D), got ", query.sizes(),
                    " and ", table.sizes());
  TORCH_CHECK_VALUE(
      is_supported_float(query.scalar_type()) && is_supported_float(table.scalar_type()),
      "sampled_softmax: query and table must be float32, bfloat16, float16 or float64, got ",
      query.scalar_type(), " and ", table.scalar_type());
  TORCH_CHECK_VALUE((query.scalar_type() == at::kDouble) == (table.scalar_type() == at::kDouble),
                    "sampled_softmax: float64 query and table go together, got ",
                    query.scalar_type(), " and ", table.scalar_type());
  check_device("table", table, query);
  check_temperature(temperature);
  check_shape("positive", positive, {query.size(0)});
  check_ids("positive", positive, table.size(0), query);
  check_ids("negatives", negatives, table.size(0), query);
  check_log_q("log_q_positive", log_q_positive, positive);
  check_log_q("log_q_negatives", log_q_negatives, negatives);
}

}  // namespace

void check_sampled_softmax(const SampledSoftmaxProblem& problem) {
  check_common(problem);
  const int64_t num_rows = problem.query.size(0);
  TORCH_CHECK_VALUE(problem.negatives.dim() == 2 && problem.negatives.size(0) == num_rows,
                    "sampled_softmax: negatives must be (M,) or (B, M) with B = ", num_rows,
                    ", got ", problem.negatives.sizes());
}

void check_sampled_softmax_shared(const SampledSoftmaxProblem& problem) {
  check_common(problem);
  TORCH_CHECK_VALUE(problem.negatives.dim() == 1,
                    "sampled_softmax: negatives of all rows must be (M,), got ",
                    problem.negatives.sizes());
}

void check_sampled_softmax(const SampledSoftmaxUpstream& upstream) {
  const auto& [grad_loss, loss, p, query, positive, negatives, temperature, num_items] = upstream;
  TORCH_CHECK_VALUE(query.dim() == 2 && negatives.dim() == 2,
                    "sampled_softmax: query must be (B, D) and negatives (B, M), got ",
                    query.sizes(), " and ", negatives.sizes());
  const int64_t num_rows = query.size(0);
  check_shape("grad_loss", grad_loss, {num_rows});
  check_shape("loss", loss, {num_rows});
  check_shape("positive", positive, {num_rows});
  check_shape("p", p, {num_rows, negatives.size(1)});
  check_shape("negatives", negatives, p.sizes());
  check_temperature(temperature);
  check_ids("positive", positive, num_items, query);
  check_ids("negatives", negatives, num_items, query);
}

}  // namespace torchrec_pt
