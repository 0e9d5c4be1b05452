#include "simt/atomics.h"

#include <algorithm>

#include "simt/executor.h"

namespace simt {
namespace {

template <typename T, typename Change>
T change(T* address, Change change) {
  active_executor->touch(active_executor->current(), address, sizeof(T), Access::kAtomic, nullptr);
  const T before = *address;
  *address = change(before);
  return before;
}

template <typename T>
T add(T* address, T value) {
  return change(address, [=](T before) { return static_cast<T>(before + value); });
}

template <typename T>
T maximum(T* address, T value) {
  return change(address, [=](T before) { return std::max(before, value); });
}

}  // namespace

int atomic_add(int* address, int value) { return add(address, value); }
unsigned atomic_add(unsigned* address, unsigned value) { return add(address, value); }
unsigned long long atomic_add(unsigned long long* address, unsigned long long value) {
  return add(address, value);
}
float atomic_add(float* address, float value) { return add(address, value); }
int atomic_max(int* address, int value) { return maximum(address, value); }
unsigned atomic_max(unsigned* address, unsigned value) { return maximum(address, value); }

}  // namespace simt
