// Stacks, and the switch from one to another: what a CUDA thread is made of here.

#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#ifndef SIMT_UCONTEXT
#define SIMT_UCONTEXT
#endif
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  unsigned char* stack = nullptr;  // its lowest byte
  std::size_t num_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#ifdef SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// Makes `entry` the next thing that runs on the fiber's stack. It must call arrive_from first and
// never return.
void prepare(Fiber& fiber, void (*entry)());

// Goes on with `to`; returns when something switches back to `from`, which is where this runs.
void switch_fiber(Fiber& from, Fiber& to);
// The same from a fiber that is done.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);
// Called first by a fiber that has just been prepared. `origin` is the stack that the process gave
// us: it learns its extent when the first fiber comes from there.
void arrive(Fiber& origin);

// Room for `kMaxStacks` stacks; those below a page without access, so that overflow is a fault and
// not a mystery.
class StackPool {
 public:
  static constexpr std::size_t kMaxStacks = 1024;
  static constexpr std::size_t kStackBytes = 256 * 1024;

  StackPool();
  ~StackPool();
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  // Gives the fiber stack `index`.
  void assign(Fiber& fiber, std::size_t index);
  bool contains(const void* address) const {
    return reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(base_) <
           kMaxStacks * kStackBytes;
  }
  // After fibers were left in the middle of what they did.
  void forget_poison();

 private:
  unsigned char* base_;
  std::size_t num_open_ = 0;
};

}  // namespace simt
