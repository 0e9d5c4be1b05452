// The functions that `g++ -fsanitize=thread` calls before each load and store that another thread
// might see. ThreadSanitizer's own would know nothing of fibers, blocks and barriers, so device
// code is linked with these instead of its library.

#include "simt/executor.h"

namespace simt {
namespace {

inline void touch(const void* address, std::size_t num_bytes, Access access) {
  Executor* executor = active_executor;
  if (executor == nullptr) return;  // host code of the same file
  executor->touch(executor->current(), address, num_bytes, access, nullptr);
}

// An access of one instruction, which must be aligned to its size on the device.
inline void touch_aligned(const void* address, std::size_t num_bytes, Access access) {
  Executor* executor = active_executor;
  if (executor == nullptr) return;
  if (reinterpret_cast<std::uintptr_t>(address) % num_bytes != 0) {
    executor->fail(executor->current(), "misaligned",
                   (access == Access::kRead ? "reads " : "writes ") + std::to_string(num_bytes) +
                       " bytes at an address that is not a multiple of that");
  }
  executor->touch(executor->current(), address, num_bytes, access, nullptr);
}

}  // namespace
}  // namespace simt

extern "C" {

#define SIMT_HOOKS(num_bytes)                                      \
  void __tsan_read##num_bytes(void* address) {                     \
    simt::touch_aligned(address, num_bytes, simt::Access::kRead);  \
  }                                                                \
  void __tsan_write##num_bytes(void* address) {                    \
    simt::touch_aligned(address, num_bytes, simt::Access::kWrite); \
  }                                                                \
  void __tsan_unaligned_read##num_bytes(void* address) {           \
    simt::touch(address, num_bytes, simt::Access::kRead);          \
  }                                                                \
  void __tsan_unaligned_write##num_bytes(void* address) {          \
    simt::touch(address, num_bytes, simt::Access::kWrite);         \
  }                                                                \
  void __tsan_volatile_read##num_bytes(void* address) {            \
    simt::touch_aligned(address, num_bytes, simt::Access::kRead);  \
  }                                                                \
  void __tsan_volatile_write##num_bytes(void* address) {           \
    simt::touch_aligned(address, num_bytes, simt::Access::kWrite); \
  }

SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

void __tsan_read_range(void* address, unsigned long num_bytes) {
  if (num_bytes > 0) simt::touch(address, num_bytes, simt::Access::kRead);
}
void __tsan_write_range(void* address, unsigned long num_bytes) {
  if (num_bytes > 0) simt::touch(address, num_bytes, simt::Access::kWrite);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

}  // extern "C"
