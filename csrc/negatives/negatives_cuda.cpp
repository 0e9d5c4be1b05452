// negatives on CUDA: from tensors to the pointers of negatives_device.h, and back. Nothing here
// waits for the device: rows and exclusions are not read on the host.

#include <ATen/Functions.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "device/torch_cuda.h"
#include "negatives/negatives.h"
#include "negatives/negatives_device.h"

namespace torchrec_pt {
namespace {

std::tuple<at::Tensor, at::Tensor> sample_negatives_cuda(
    const at::Tensor& rows, int64_t num_draws, int64_t num_items, int64_t seed, int64_t step,
    const OptionalTensor& columns, const OptionalTensor& mass, const OptionalTensor& exclude,
    const OptionalTensor& exclude_offsets) {
  const NegativesProblem inputs{rows.contiguous(), num_draws, num_items, seed,           step,
                                columns,           mass,      exclude,   exclude_offsets};
  check_negatives(inputs);
  const OnDevice device(rows);
  auto items = at::empty({rows.size(0), num_draws}, rows.options());
  auto log_q = empty_log_q(inputs);
  constexpr int64_t kMostThreads = int64_t{1} << 37;
  TORCH_CHECK_VALUE(items.numel() < kMostThreads, "negatives: at most ", kMostThreads,
                    " draws at once on CUDA, got ", items.sizes());
  if (rows.size(0) == 0) return {items, log_q};
  const device::NegativesOnDevice problem{inputs.rows.const_data_ptr<int64_t>(),
                                          rows.size(0),
                                          num_draws,
                                          distribution_of(inputs),
                                          key_of(inputs),
                                          total_mass(inputs),
                                          data_or_null<int64_t>(exclude),
                                          data_or_null<int64_t>(exclude_offsets),
                                          exclude ? exclude->numel() : 0};
  const auto log_scale = columns ? at::empty({rows.size(0)}, log_q.options()) : log_q;
  const auto mass_left = at::empty({rows.size(0)}, rows.options());
  const device::NegativesRows of_rows{
      log_scale.mutable_data_ptr<float>(),
      reinterpret_cast<std::uint64_t*>(mass_left.mutable_data_ptr<int64_t>())};
  check_launch(device::launch_negatives_rows(problem, of_rows, device.stream()));
  if (num_draws == 0) return {items, log_q};
  check_launch(device::launch_negatives_draw(problem, of_rows, items.mutable_data_ptr<int64_t>(),
                                             columns ? log_q.mutable_data_ptr<float>() : nullptr,
                                             device.stream()));
  return {items, log_q};
}

at::Tensor philox_cuda(const at::Tensor& counters, const at::Tensor& key) {
  check_philox(counters, key);
  const OnDevice device(counters);
  const auto in = counters.contiguous();
  const auto key_words = key.contiguous();
  auto words = at::empty_like(in);
  if (in.size(0) == 0) return words;
  check_launch(device::launch_philox(in.const_data_ptr<int64_t>(),
                                     key_words.const_data_ptr<int64_t>(), in.size(0),
                                     words.mutable_data_ptr<int64_t>(), device.stream()));
  return words;
}

TORCH_LIBRARY_IMPL(torchrec_pt, TORCHREC_PT_DEVICE_KEY, m) {
  m.impl("philox", &philox_cuda);
  m.impl("sample_negatives", &sample_negatives_cuda);
}

}  // namespace
}  // namespace torchrec_pt
