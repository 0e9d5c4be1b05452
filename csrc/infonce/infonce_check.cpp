// What every device asks of the inputs of infonce.

#include <c10/util/Exception.h>

#include "infonce/infonce.h"

namespace torchrec_pt {
namespace {

void check_vector(const char* name, const OptionalTensor& vector, int64_t size, bool is_id,
                  const InfonceProblem& problem) {
  if (!vector) return;
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == size, "infonce: ", name,
                    " must have shape (", size, ",), got ", vector->sizes());
  TORCH_CHECK_VALUE(is_id ? vector->scalar_type() == at::kLong : vector->is_floating_point(),
                    "infonce: ", name, " must be ", is_id ? "int64" : "floating point", ", got ",
                    vector->scalar_type());
  TORCH_CHECK_VALUE(vector->device() == problem.query.device(), "infonce: ", name, " is on ",
                    vector->device(), " but query is on ", problem.query.device());
}

// What the losses of one and of both directions share.
void check_common(const InfonceProblem& problem) {
  const auto& [query, keys, target, temperature, log_q, key_ids, query_ids, key_query_ids,
               self_index, log_q_positive, key_bias] = problem;
  TORCH_CHECK_VALUE(query.dim() == 2 && keys.dim() == 2 && query.size(1) == keys.size(1),
                    "infonce: query must be (B, D) and keys (N, D), got ", query.sizes(), " and ",
                    keys.sizes());
  TORCH_CHECK_VALUE(
      is_supported_float(query.scalar_type()) && is_supported_float(keys.scalar_type()),
      "infonce: query and keys must be float32, bfloat16, float16 or float64, got ",
      query.scalar_type(), " and ", keys.scalar_type());
  TORCH_CHECK_VALUE((query.scalar_type() == at::kDouble) == (keys.scalar_type() == at::kDouble),
                    "infonce: float64 query and keys go together, got ", query.scalar_type(),
                    " and ", keys.scalar_type());
  TORCH_CHECK_VALUE(query.device() == keys.device(), "infonce: keys is on ", keys.device(),
                    " but query is on ", query.device());
  TORCH_CHECK_VALUE(temperature.dim() == 0 && temperature.is_floating_point(),
                    "infonce: temperature must be a float or a 0-dim floating point tensor, got ",
                    temperature.scalar_type(), " of shape ", temperature.sizes());

  const int64_t num_rows = query.size(0);
  const int64_t num_keys = keys.size(0);
  check_vector("target", target, num_rows, true, problem);
  check_vector("log_q", log_q, num_keys, false, problem);
  check_vector("key_ids", key_ids, num_keys, true, problem);
  check_vector("query_ids", query_ids, num_rows, true, problem);
  check_vector("key_query_ids", key_query_ids, num_keys, true, problem);
  check_vector("self_index", self_index, num_rows, true, problem);
  check_vector("log_q_positive", log_q_positive, num_rows, false, problem);
  check_vector("key_bias", key_bias, num_keys, false, problem);
  TORCH_CHECK_VALUE(query_ids.has_value() == key_query_ids.has_value(),
                    "infonce: query_ids and key_query_ids go together");
}

}  // namespace

void check_infonce(const InfonceProblem& problem) {
  check_common(problem);
  TORCH_CHECK_VALUE(problem.target || (!problem.key_ids && !problem.log_q_positive),
                    "infonce: key_ids and log_q_positive need a target");
}

void check_infonce_symmetric(const InfonceProblem& problem, const OptionalTensor& row_weight) {
  check_common(problem);
  TORCH_CHECK_VALUE(problem.query.size(0) <= problem.keys.size(0),
                    "infonce: symmetric needs a key for each query, got ", problem.query.size(0),
                    " queries and ", problem.keys.size(0), " keys");
  check_vector("row_weight", row_weight, problem.query.size(0), false, problem);
}

}  // namespace torchrec_pt
