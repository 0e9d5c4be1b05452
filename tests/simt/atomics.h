// Atomic operations. Fibers run one at a time, so the plain operation is atomic; the executor is
// told that this access may meet others of its kind.

#pragma once

#include <type_traits>

#include "simt/types.h"

namespace simt {

int atomic_add(int* address, int value);
unsigned atomic_add(unsigned* address, unsigned value);
unsigned long long atomic_add(unsigned long long* address, unsigned long long value);
float atomic_add(float* address, float value);
int atomic_max(int* address, int value);
unsigned atomic_max(unsigned* address, unsigned value);

}  // namespace simt

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::atomic_add(address, value);
}

template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::atomic_max(address, value);
}
