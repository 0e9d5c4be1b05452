// infonce on CUDA: from tensors to the pointers of infonce_device.h, and back.
//
// 16-bit query and keys of one type are multiplied in that type. Any other pair is float32, by tf32
// where torch's float32 matmul precision allows it ("high", "medium"), else by three tf32 products.
// Nothing here waits for the device: temperature and target are not read on the host.

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "device/torch_cuda.h"
#include "infonce/infonce.h"
#include "infonce/infonce_device.h"

namespace torchrec_pt {
namespace {

// Row numbers are int32, and a tile may reach past the last row.
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() - (1 << 20);
constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::ScalarType stored_type(const InfonceProblem& problem) {
  const auto type = problem.query.scalar_type();
  return type == problem.keys.scalar_type() ? type : at::kFloat;
}

device::Numbers numbers_of(at::ScalarType type) {
  if (type == at::kBFloat16) return device::Numbers::kBfloat16;
  if (type == at::kHalf) return device::Numbers::kFloat16;
  return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST
             ? device::Numbers::kTf32x3
             : device::Numbers::kTf32;
}

// The matrix itself where its rows start at multiples of 16 bytes, else a padded copy.
at::Tensor with_aligned_rows(const at::Tensor& matrix, at::ScalarType type) {
  const at::Tensor typed = matrix.to(type);
  const int64_t size = typed.element_size();
  const bool is_aligned = typed.stride(1) == 1 && typed.stride(0) * size % 16 == 0 &&
                          reinterpret_cast<std::uintptr_t>(typed.const_data_ptr()) % 16 == 0;
  if (is_aligned) return typed;
  const int64_t multiple = 16 / size;
  const int64_t stride = (typed.size(1) + multiple - 1) / multiple * multiple;
  auto copy = at::empty({typed.size(0), stride}, typed.options()).narrow(1, 0, typed.size(1));
  copy.copy_(typed);
  return copy;
}

OptionalTensor to_float(const OptionalTensor& vector) {
  return vector ? OptionalTensor(vector->to(at::kFloat).contiguous()) : std::nullopt;
}

OptionalTensor minus(const OptionalTensor& a, const OptionalTensor& b) {
  if (!b) return a;
  return a ? *a - *b : -*b;
}

at::Tensor temperature_on_device(const InfonceProblem& problem) {
  const auto& temperature = problem.temperature;
  TORCH_CHECK_VALUE(!temperature.device().is_cpu() || temperature.item<double>() > 0,
                    "infonce: temperature must be positive, got ", temperature.item<double>());
  return float_on_device_of(problem.query, temperature);
}

float* pointer(const at::Tensor& vector) { return vector.mutable_data_ptr<float>(); }

// Keeps what the kernels' pointers point to.
class Prepared {
 public:
  Prepared(const InfonceProblem& problem, const OptionalTensor& is_live)
      : num_rows(problem.query.size(0)),
        num_keys(problem.keys.size(0)),
        type(stored_type(problem)),
        numbers(numbers_of(type)),
        query_(with_aligned_rows(problem.query, type)),
        keys_(with_aligned_rows(problem.keys, type)),
        temperature_(temperature_on_device(problem)),
        is_live_(is_live),
        target_(contiguous(problem.target)),
        query_ids_(contiguous(problem.query_ids)),
        key_query_ids_(contiguous(problem.key_query_ids)),
        self_index_(contiguous(problem.self_index)),
        key_ids_(contiguous(problem.key_ids)) {
    check_sizes();
    const auto key_bias = to_float(problem.key_bias);
    shift_ = minus(key_bias, to_float(problem.log_q));
    if (target_) {
      positive_shift_ = minus(at_target(key_bias), to_float(problem.log_q_positive));
      target_ids_ = at_target(key_ids_);
    }
  }

  device::InfonceOnDevice on_device() const {
    device::InfonceQueries queries{};
    queries.vectors = query_.const_data_ptr();
    queries.stride = query_.stride(0);
    queries.num = static_cast<int>(num_rows);
    queries.is_live = data_or_null<bool>(is_live_);
    queries.target = data_or_null<int64_t>(target_);
    queries.positive_shift = data_or_null<float>(positive_shift_);
    queries.target_id = data_or_null<int64_t>(target_ids_);
    queries.query_id = data_or_null<int64_t>(query_ids_);
    queries.self_index = data_or_null<int64_t>(self_index_);
    device::InfonceKeys keys{};
    keys.vectors = keys_.const_data_ptr();
    keys.stride = keys_.stride(0);
    keys.num = static_cast<int>(num_keys);
    keys.shift = data_or_null<float>(shift_);
    keys.key_id = data_or_null<int64_t>(key_ids_);
    keys.key_query_id = data_or_null<int64_t>(key_query_ids_);
    return {queries, keys, static_cast<int>(query_.size(1)), temperature_.const_data_ptr<float>()};
  }

  bool is_empty() const { return num_rows == 0 || num_keys == 0; }

  at::Tensor empty_floats(at::IntArrayRef shape) const {
    return at::empty(shape, query_.options().dtype(at::kFloat));
  }
  at::Tensor empty_sums(int64_t size) const {
    static_assert(sizeof(device::SoftmaxSums) == 3 * sizeof(float));
    return empty_floats({size, 3});
  }

  const int64_t num_rows;
  const int64_t num_keys;
  const at::ScalarType type;
  const device::Numbers numbers;

 private:
  void check_sizes() const {
    TORCH_CHECK_VALUE(type != at::kDouble, "infonce: float64 runs on the CPU alone; use float32");
    TORCH_CHECK_VALUE(query_.size(1) <= device::kMostDims, "infonce: on CUDA D may be at most ",
                      device::kMostDims, ", got ", query_.size(1));
    TORCH_CHECK_VALUE(std::max(num_rows, num_keys) <= kMostRows,
                      "infonce: on CUDA B and N may be at most ", kMostRows, ", got ", num_rows,
                      " and ", num_keys);
    TORCH_CHECK_VALUE(num_keys > 0 || !target_ || num_rows == 0,
                      "infonce: target must be in [0, N) with N = 0");
  }

  OptionalTensor at_target(const OptionalTensor& of_keys) const {
    if (!of_keys || is_empty()) return std::nullopt;
    return of_keys->index_select(0, *target_);
  }

  at::Tensor query_;
  at::Tensor keys_;
  at::Tensor temperature_;
  OptionalTensor is_live_;
  OptionalTensor target_;
  OptionalTensor query_ids_;
  OptionalTensor key_query_ids_;
  OptionalTensor self_index_;
  OptionalTensor key_ids_;
  OptionalTensor shift_;
  OptionalTensor positive_shift_;
  OptionalTensor target_ids_;
};

device::SoftmaxSums* sums_of(const at::Tensor& tensor) {
  return reinterpret_cast<device::SoftmaxSums*>(pointer(tensor));
}

// The softmax sums of the rows and, where num_columns > 0, of the columns.
struct Sums {
  Sums(const Prepared& prepared, const device::InfonceOnDevice& problem, const OnDevice& device,
       int64_t num_columns)
      : rows(prepared.empty_sums(prepared.num_rows)),
        columns(prepared.empty_sums(num_columns)),
        positive_dot(prepared.empty_floats({prepared.num_rows}).zero_()) {
    const auto grid = device::infonce_forward_grid(
        prepared.numbers, problem.dim, problem.queries.num, problem.keys.num,
        num_columns > 0 ? OnDevice::kColumnTiles : INT32_MAX, device.num_blocks());
    const auto row_parts = prepared.empty_sums(grid.num_splits * prepared.num_rows);
    const auto column_parts = prepared.empty_sums(int64_t{grid.num_at_once} * num_columns);
    const device::InfonceForwardResults results{
        sums_of(row_parts), pointer(positive_dot), sums_of(rows),
        num_columns > 0 ? sums_of(column_parts) : nullptr, sums_of(columns)};
    check_launch(
        device::launch_infonce_forward(prepared.numbers, problem, grid, results, device.stream()));
  }

  at::Tensor rows;
  at::Tensor columns;
  at::Tensor positive_dot;
};

// The gradient of the queries or of the keys, and of key_bias where `bias` is defined.
at::Tensor side_gradient(const Prepared& prepared, const device::InfonceOnDevice& problem,
                         const OnDevice& device, const at::Tensor& grad_scale, bool own_is_query,
                         const at::Tensor& bias) {
  const int num_own = own_is_query ? problem.queries.num : problem.keys.num;
  const int num_other = own_is_query ? problem.keys.num : problem.queries.num;
  const auto grid = device::infonce_backward_grid(prepared.numbers, problem.dim, num_own, num_other,
                                                  device.num_blocks());
  const int64_t num_parts = grid.num_splits > 1 ? grid.num_splits : 0;
  const auto parts = prepared.empty_floats({num_parts, num_own, problem.dim});
  const auto bias_parts = prepared.empty_floats({bias.defined() ? num_parts : 0, num_own});
  auto grad = at::empty({num_own, problem.dim}, parts.options().dtype(prepared.type));
  const device::InfonceBackwardResults results{
      grad.mutable_data_ptr(), bias.defined() ? pointer(bias) : nullptr, pointer(parts),
      pointer(bias_parts), grad_scale.const_data_ptr<float>()};
  check_launch(device::launch_infonce_backward(prepared.numbers, own_is_query, problem, grid,
                                               results, device.stream()));
  return grad;
}

InfonceGradients gradients(const InfonceProblem& inputs, const Prepared& prepared,
                           const device::InfonceOnDevice& problem, const OnDevice& device,
                           const at::Tensor& grad_scale) {
  const bool has_bias = inputs.key_bias.has_value();
  const auto bias = prepared.empty_floats({has_bias ? prepared.num_keys : 0});
  const auto grad_query = side_gradient(prepared, problem, device, grad_scale, true, at::Tensor());
  const auto grad_keys =
      side_gradient(prepared, problem, device, grad_scale, false, has_bias ? bias : at::Tensor());
  return in_dtypes_of(inputs, grad_query, grad_keys, bias);
}

InfonceGradients no_gradients(const InfonceProblem& inputs) {
  const auto& [query, keys] = std::tie(inputs.query, inputs.keys);
  const auto bias = inputs.key_bias
                        ? at::zeros(inputs.key_bias->sizes(), inputs.key_bias->options())
                        : at::empty({0}, query.options().dtype(at::kFloat));
  return {at::zeros(query.sizes(), query.options()), at::zeros(keys.sizes(), keys.options()), bias};
}

// --- one direction ------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> infonce_forward_cuda(
    const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& target,
    const at::Tensor& temperature, const OptionalTensor& log_q, const OptionalTensor& key_ids,
    const OptionalTensor& query_ids, const OptionalTensor& key_query_ids,
    const OptionalTensor& self_index, const OptionalTensor& log_q_positive,
    const OptionalTensor& key_bias) {
  const InfonceProblem inputs{query,      keys,           target,    temperature,
                              log_q,      key_ids,        query_ids, key_query_ids,
                              self_index, log_q_positive, key_bias};
  check_infonce(inputs);
  const OnDevice device(query);
  const Prepared prepared(inputs, std::nullopt);
  const auto lse = prepared.empty_floats({prepared.num_rows}).fill_(-kInfinity);
  const auto positive = at::zeros_like(lse);
  const auto expected_dot = at::zeros_like(lse);
  if (prepared.is_empty()) return {lse, positive, expected_dot, at::zeros_like(lse)};
  const auto problem = prepared.on_device();
  const Sums sums(prepared, problem, device, 0);
  const device::InfonceRowOutputs outputs{pointer(lse), pointer(positive), pointer(expected_dot)};
  check_launch(device::launch_infonce_rows(problem, sums_of(sums.rows), pointer(sums.positive_dot),
                                           outputs, device.stream()));
  return {lse, positive, expected_dot, sums.positive_dot};
}

InfonceGradients infonce_backward_cuda(
    const at::Tensor& grad_lse, const at::Tensor& grad_positive, const at::Tensor& lse,
    const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& target,
    const at::Tensor& temperature, const OptionalTensor& log_q, const OptionalTensor& key_ids,
    const OptionalTensor& query_ids, const OptionalTensor& key_query_ids,
    const OptionalTensor& self_index, const OptionalTensor& log_q_positive,
    const OptionalTensor& key_bias) {
  const InfonceProblem inputs{query,      keys,           target,    temperature,
                              log_q,      key_ids,        query_ids, key_query_ids,
                              self_index, log_q_positive, key_bias};
  check_infonce(inputs);
  const OnDevice device(query);
  // A row without upstream, or without an allowed key, takes part in nothing, whatever it holds.
  const auto is_live =
      ((grad_lse != 0).logical_or(grad_positive != 0)).logical_and(lse != -kInfinity);
  const Prepared prepared(inputs, is_live);
  if (prepared.is_empty()) return no_gradients(inputs);
  const auto nothing = at::zeros({}, lse.options());
  const auto row_grad = at::where(is_live, grad_lse, nothing);
  const auto target_grad = at::where(is_live, grad_positive, nothing);
  const auto grad_scale = at::maximum(row_grad.abs().max(), target_grad.abs().max());
  const auto lse_row = lse.contiguous();
  auto problem = prepared.on_device();
  problem.queries.lse = pointer(lse_row);
  problem.queries.grad = pointer(row_grad);
  problem.queries.grad_target = pointer(target_grad);
  return gradients(inputs, prepared, problem, device, grad_scale);
}

// --- both directions ----------------------------------------------------------------------------

OptionalTensor is_live_by(const OptionalTensor& row_weight) {
  return row_weight ? OptionalTensor((*row_weight != 0).contiguous()) : std::nullopt;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> infonce_symmetric_forward_cuda(
    const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& row_weight,
    const at::Tensor& temperature, const OptionalTensor& log_q, const OptionalTensor& key_ids,
    const OptionalTensor& query_ids, const OptionalTensor& key_query_ids,
    const OptionalTensor& self_index, const OptionalTensor& log_q_positive,
    const OptionalTensor& key_bias) {
  const InfonceProblem inputs{query,      keys,           std::nullopt, temperature,
                              log_q,      key_ids,        query_ids,    key_query_ids,
                              self_index, log_q_positive, key_bias};
  check_infonce_symmetric(inputs, row_weight);
  const OnDevice device(query);
  const Prepared prepared(with_diagonal_target(inputs), is_live_by(row_weight));
  const auto loss = prepared.empty_floats({prepared.num_rows});
  const auto lse = at::empty_like(loss);
  const auto column_lse = at::empty_like(loss);
  const auto slope = at::empty_like(loss);
  if (prepared.is_empty()) return {loss, lse, column_lse, slope};
  auto problem = prepared.on_device();
  problem.keys.num_columns = problem.queries.num;
  const Sums sums(prepared, problem, device, prepared.num_rows);
  const device::InfoncePairOutputs outputs{pointer(loss), pointer(lse), pointer(column_lse),
                                           pointer(slope)};
  check_launch(device::launch_infonce_pairs(problem, sums_of(sums.rows), sums_of(sums.columns),
                                            pointer(sums.positive_dot), outputs, device.stream()));
  return {loss, lse, column_lse, slope};
}

InfonceGradients infonce_symmetric_backward_cuda(
    const at::Tensor& grad_loss, const at::Tensor& lse, const at::Tensor& column_lse,
    const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& row_weight,
    const at::Tensor& temperature, const OptionalTensor& log_q, const OptionalTensor& key_ids,
    const OptionalTensor& query_ids, const OptionalTensor& key_query_ids,
    const OptionalTensor& self_index, const OptionalTensor& log_q_positive,
    const OptionalTensor& key_bias) {
  const InfonceProblem inputs{query,      keys,           std::nullopt, temperature,
                              log_q,      key_ids,        query_ids,    key_query_ids,
                              self_index, log_q_positive, key_bias};
  check_infonce_symmetric(inputs, row_weight);
  const OnDevice device(query);
  const auto is_live = is_live_by(row_weight);
  const Prepared prepared(with_diagonal_target(inputs), is_live);
  if (prepared.is_empty()) return no_gradients(inputs);
  // Each direction is half of the loss; the target is in both.
  const auto grad = is_live ? at::where(*is_live, grad_loss, at::zeros({}, grad_loss.options()))
                            : grad_loss.contiguous();
  const auto half_grad = grad / 2;
  const auto target_grad = -grad;
  const auto grad_scale = grad.abs().max();
  const auto lse_row = lse.contiguous();
  const auto lse_column = column_lse.contiguous();
  auto problem = prepared.on_device();
  problem.queries.lse = pointer(lse_row);
  problem.queries.grad = pointer(half_grad);
  problem.queries.grad_target = pointer(target_grad);
  problem.keys.num_columns = problem.queries.num;
  problem.keys.column_lse = pointer(lse_column);
  problem.keys.column_grad = pointer(half_grad);
  return gradients(inputs, prepared, problem, device, grad_scale);
}

TORCH_LIBRARY_IMPL(torchrec_pt, TORCHREC_PT_DEVICE_KEY, m) {
  m.impl("infonce_forward", &infonce_forward_cuda);
  m.impl("infonce_backward", &infonce_backward_cuda);
  m.impl("infonce_symmetric_forward", &infonce_symmetric_forward_cuda);
  m.impl("infonce_symmetric_backward", &infonce_symmetric_backward_cuda);
}

}  // namespace
}  // namespace torchrec_pt
