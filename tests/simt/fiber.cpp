#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#ifdef SIMT_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef SIMT_UCONTEXT
// Saves the registers that a function must keep, exchanges stacks, and returns on the new one.
// ucontext would make a system call for the signal mask at every switch.
asm(R"(
.text
.globl simt_exchange_stacks
.hidden simt_exchange_stacks
.type simt_exchange_stacks, @function
simt_exchange_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_exchange_stacks, .-simt_exchange_stacks
)");
extern "C" void simt_exchange_stacks(void** keep, void* next);
#endif

namespace simt {
namespace {

void exchange(Fiber& from, Fiber& to) {
#ifdef SIMT_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  simt_exchange_stacks(&from.stack_pointer, to.stack_pointer);
#endif
}

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
#ifdef SIMT_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.num_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // As if `entry` had been called and had switched away at once: six registers, its address, and
  // the address it would return to.
  auto** top = reinterpret_cast<void**>(fiber.stack + fiber.num_bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 8;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef SIMT_SANITIZED
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.num_bytes);
#endif
  exchange(from, to);
#ifdef SIMT_SANITIZED
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void leave_fiber(Fiber& from, Fiber& to) {
#ifdef SIMT_SANITIZED
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.num_bytes);
#endif
  exchange(from, to);
  __builtin_unreachable();
}

void arrive([[maybe_unused]] Fiber& origin) {
#ifdef SIMT_SANITIZED
  const void* stack;
  std::size_t num_bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &num_bytes);
  if (origin.stack == nullptr) {
    origin.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
    origin.num_bytes = num_bytes;
  }
#endif
}

StackPool::StackPool() {
  void* mapped = mmap(nullptr, kMaxStacks * kStackBytes, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<unsigned char*>(mapped);
}

StackPool::~StackPool() {
  forget_poison();
  munmap(base_, kMaxStacks * kStackBytes);
}

void StackPool::assign(Fiber& fiber, std::size_t index) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (; num_open_ <= index; ++num_open_) {
    unsigned char* lowest = base_ + num_open_ * kStackBytes + page;
    if (mprotect(lowest, kStackBytes - page, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  // The threads of a block use the same depth of their stacks at the same time. Tops at the same
  // place of a page would all compete for the same few lines of the caches.
  const std::size_t offset = index * 448 % page;
  fiber.stack = base_ + index * kStackBytes + page;
  fiber.num_bytes = kStackBytes - page - offset;
}

void StackPool::forget_poison() {
#ifdef SIMT_SANITIZED
  __asan_unpoison_memory_region(base_, num_open_ * kStackBytes);
#endif
}

}  // namespace simt
