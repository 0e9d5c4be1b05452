// sampled_softmax on CUDA: from tensors to the pointers of sampled_softmax_device.h, and back.
//
// Backward sorts the B (M + 1) pairs of an item and a row of the batch by torch's stable sort.
// Only the size of the sparse gradient, which is the device's to say, is waited for.

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "device/torch_cuda.h"
#include "sampled_softmax/sampled_softmax.h"
#include "sampled_softmax/sampled_softmax_device.h"

namespace torchrec_pt {
namespace {

device::Stored stored_as(at::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype != at::kDouble,
                    "sampled_softmax: float64 runs on the CPU alone; use float32");
  if (dtype == at::kBFloat16) return device::Stored::kBfloat16;
  return dtype == at::kHalf ? device::Stored::kFloat16 : device::Stored::kFloat32;
}

void check_sizes(int64_t num_rows, int64_t num_negatives, int64_t dim) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(dim <= device::kMostDims, "sampled_softmax: on CUDA D may be at most ",
                    device::kMostDims, ", got ", dim);
  TORCH_CHECK_VALUE(num_rows * (num_negatives + 1) <= kMost,
                    "sampled_softmax: on CUDA B (M + 1) may be at most ", kMost, ", got ",
                    num_rows * (num_negatives + 1));
}

bool is_aligned(const at::Tensor& tensor, int64_t num_bytes) {
  return reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % num_bytes == 0;
}

// Rows of float32 that can be read four values at a time where D is a multiple of four.
at::Tensor float_rows(const at::Tensor& matrix) {
  const auto rows = matrix.to(at::kFloat).contiguous();
  return is_aligned(rows, 4 * sizeof(float)) ? rows : rows.clone();
}

OptionalTensor to_float(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->to(at::kFloat)) : std::nullopt;
}

template <typename T>
device::Strided<T> strided(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.dim() == 2 ? tensor.stride(1) : 0};
}

template <typename T>
device::Strided<T> strided(const OptionalTensor& tensor) {
  return tensor ? strided<T>(*tensor) : device::Strided<T>{};
}

bool has_vectors(const at::Tensor& table) {
  return table.size(1) % 4 == 0 && table.stride(1) == 1 && table.stride(0) % 4 == 0 &&
         is_aligned(table, 4 * table.element_size());
}

// --- forward ------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor, at::Tensor> sampled_softmax_forward_cuda(
    const at::Tensor& query, const at::Tensor& table, const at::Tensor& positive,
    const at::Tensor& negatives, const at::Tensor& temperature,
    const OptionalTensor& log_q_positive, const OptionalTensor& log_q_negatives,
    bool with_gradients, bool /*sparse*/) {
  const SampledSoftmaxProblem problem{query,       table,          positive,       negatives,
                                      temperature, log_q_positive, log_q_negatives};
  check_sampled_softmax(problem);
  const auto stored = stored_as(table.scalar_type());
  check_sizes(query.size(0), negatives.size(1), query.size(1));
  const OnDevice device(query);
  const auto options = query.options().dtype(at::kFloat);
  const auto loss = at::empty({query.size(0)}, options);
  const auto p = with_gradients ? at::empty(negatives.sizes(), options) : at::empty({0}, options);
  const auto direction =
      with_gradients ? at::empty(query.sizes(), options) : at::empty({0}, options);
  if (query.size(0) == 0) return {loss, p, direction};

  const auto rows = float_rows(query);
  const auto tau = float_on_device_of(query, temperature);
  const auto of_positive = to_float(log_q_positive);
  const auto of_negatives = to_float(log_q_negatives);
  const device::SampledSoftmaxOnDevice on_device{
      rows.const_data_ptr<float>(),
      {table.const_data_ptr(), table.stride(0), table.stride(1)},
      has_vectors(table),
      strided<int64_t>(positive),
      strided<int64_t>(negatives),
      tau.const_data_ptr<float>(),
      strided<float>(of_positive),
      strided<float>(of_negatives),
      static_cast<int>(query.size(0)),
      static_cast<int>(negatives.size(1)),
      table.size(0),
      static_cast<int>(query.size(1))};
  const device::SampledSoftmaxResults results{loss.mutable_data_ptr<float>(), with_gradients,
                                              p.mutable_data_ptr<float>(),
                                              direction.mutable_data_ptr<float>()};
  check_launch(device::launch_sampled_softmax_forward(stored, on_device, results, device.stream()));
  return {loss, p, direction};
}

// --- backward -----------------------------------------------------------------------------------

// The pairs of an item and a row of the batch, sorted by item.
struct SortedPairs {
  explicit SortedPairs(const SampledSoftmaxUpstream& upstream) {
    const auto pairs = at::cat({upstream.positive.unsqueeze(1), upstream.negatives}, 1);
    std::tie(ids, numbers) = at::sort(pairs.flatten(), /*stable=*/true, 0, /*descending=*/false);
  }

  at::Tensor ids;
  at::Tensor numbers;
};

// The row of each slot, in the dtype; rows that no slot names stay as they are.
void sum_slots(const SampledSoftmaxUpstream& upstream, const SortedPairs& pairs,
               const at::Tensor& slots, const at::Tensor& grad, const OnDevice& device) {
  if (slots.numel() == 0 || grad.numel() == 0) return;
  const auto scale = (upstream.grad_loss / upstream.temperature).to(at::kFloat).contiguous();
  const auto minus_sum_of_p = at::expm1(-upstream.loss).contiguous();
  const auto p = upstream.p.contiguous();
  const auto query = float_rows(upstream.query);
  const int64_t num_pairs = slots.size(0);
  const int64_t num_chunks = (num_pairs + device::kPairsPerChunk - 1) / device::kPairsPerChunk;
  const int64_t num_quads = (query.size(1) + 3) / 4;
  const auto parts = at::empty({2, num_chunks, 4 * num_quads}, query.options());
  const device::SampledSoftmaxPairs on_device{slots.const_data_ptr<int64_t>(),
                                              pairs.numbers.const_data_ptr<int64_t>(),
                                              num_pairs,
                                              grad.size(0),
                                              scale.const_data_ptr<float>(),
                                              minus_sum_of_p.const_data_ptr<float>(),
                                              p.const_data_ptr<float>(),
                                              query.const_data_ptr<float>(),
                                              static_cast<int>(p.size(1)),
                                              static_cast<int>(query.size(1))};
  const device::SampledSoftmaxParts part_pointers{parts[0].mutable_data_ptr<float>(),
                                                  parts[1].mutable_data_ptr<float>()};
  check_launch(device::launch_sampled_softmax_backward(stored_as(grad.scalar_type()), on_device,
                                                       part_pointers, grad.mutable_data_ptr(),
                                                       device.stream()));
}

void check_upstream(const SampledSoftmaxUpstream& upstream, at::ScalarType dtype) {
  check_sampled_softmax(upstream);
  stored_as(dtype);
  check_sizes(upstream.query.size(0), upstream.negatives.size(1), upstream.query.size(1));
}

std::tuple<at::Tensor, at::Tensor> sampled_softmax_backward_sparse_cuda(
    const at::Tensor& grad_loss, const at::Tensor& loss, const at::Tensor& p,
    const at::Tensor& query, const at::Tensor& positive, const at::Tensor& negatives,
    const at::Tensor& temperature, int64_t num_items, at::ScalarType dtype) {
  const SampledSoftmaxUpstream upstream{grad_loss, loss,      p,           query,
                                        positive,  negatives, temperature, num_items};
  check_upstream(upstream, dtype);
  const OnDevice device(query);
  const SortedPairs pairs(upstream);
  const auto is_first = at::ones(pairs.ids.sizes(), pairs.ids.options().dtype(at::kBool));
  const int64_t num_pairs = pairs.ids.size(0);
  if (num_pairs > 1) {
    is_first.slice(0, 1).copy_(pairs.ids.slice(0, 1) != pairs.ids.slice(0, 0, num_pairs - 1));
  }
  const auto ids = pairs.ids.masked_select(is_first);
  const auto rows = at::empty({ids.size(0), query.size(1)}, query.options().dtype(dtype));
  sum_slots(upstream, pairs, is_first.cumsum(0) - 1, rows, device);
  return {ids, rows};
}

at::Tensor sampled_softmax_backward_dense_cuda(const at::Tensor& grad_loss, const at::Tensor& loss,
                                               const at::Tensor& p, const at::Tensor& query,
                                               const at::Tensor& positive,
                                               const at::Tensor& negatives,
                                               const at::Tensor& temperature, int64_t num_items,
                                               at::ScalarType dtype) {
  const SampledSoftmaxUpstream upstream{grad_loss, loss,      p,           query,
                                        positive,  negatives, temperature, num_items};
  check_upstream(upstream, dtype);
  const OnDevice device(query);
  const SortedPairs pairs(upstream);
  const auto grad = at::zeros({num_items, query.size(1)}, query.options().dtype(dtype));
  sum_slots(upstream, pairs, pairs.ids, grad, device);
  return grad;
}

TORCH_LIBRARY_IMPL(torchrec_pt, TORCHREC_PT_DEVICE_KEY, m) {
  m.impl("sampled_softmax_forward", &sampled_softmax_forward_cuda);
  m.impl("sampled_softmax_backward_sparse", &sampled_softmax_backward_sparse_cuda);
  m.impl("sampled_softmax_backward_dense", &sampled_softmax_backward_dense_cuda);
}

}  // namespace
}  // namespace torchrec_pt
