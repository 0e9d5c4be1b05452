// What the operators' code on tensors shares.

#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace torchrec_pt {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline bool is_supported_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

// A 0-dim tensor as float32 where `like` is. A host's number is written by a kernel: copying it
// would wait for the device.
inline at::Tensor float_on_device_of(const at::Tensor& like, const at::Tensor& scalar) {
  if (!scalar.device().is_cpu()) return scalar.to(at::kFloat);
  return at::full({}, scalar.item<double>(), like.options().dtype(at::kFloat));
}

}  // namespace torchrec_pt
